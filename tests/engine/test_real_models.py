"""SmolLM2 and Gemma 3 270M: the same greedy tokens as transformers in float32, on prompts of every kind and length.

The oracle reads prompt and answer at once: if every token of the answer is the most likely one after what stands before
it, the answer is the greedy one, token by token. For some prompts it also generates, as a check on this argument.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from harness.tiny_engine import finish, nothing_left
from harness.tiny_model import random_tokens
from harness.tolerances import GREEDY_TIE, LOGITS_FLOAT32
from kvloom import LLM, SamplingParams
from kvloom.models.tokenizer import Tokenizer

pytestmark = [pytest.mark.real_model, pytest.mark.usefixtures("two_threads"), pytest.mark.timeout(900)]

NEW_TOKENS = 64
LICENSE = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")

TEXTS = {
    "word": ("Hello", 1),
    "space": (" ", 1),
    "two words": ("Once upon", 2),
    "question": ("What is the capital of France?", 7),
    "prose": ("It was a bright cold day in April, and the clocks were striking thirteen.", 16),
    "code": ("def fibonacci(n):\n    if n < 2:\n        return n\n    return ", 17),
    "numbers": ("1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144,", 31),
    "French": ("Les sanglots longs des violons de l'automne blessent mon cœur d'une langueur monotone.", 33),
    "signs and emoji": ("日本語のテキスト 🧵🪡 и кириллица — ½ ∑∞ «quotes» \t\n\n  tabs", 45),
    "JSON": ('{"name": "kvloom", "tags": ["cache", "lanes"], "nested": {"a": [1, 2.5, -3e4, null, true]},', 50),
    "repetition": ("ba " * 200, 64),
    "chat": ("<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n", 14),
    "licence, 100 tokens": (LICENSE, 100),
    "licence, 150 tokens": (LICENSE[2000:], 150),
    "licence, 256 tokens": (LICENSE[1000:], 256),
    "licence, 500 tokens": (LICENSE[500:], 500),  # just below Gemma's window
    "licence, 600 tokens": (LICENSE[4000:], 600),  # the window has moved on
    "licence, 1000 tokens": (LICENSE, 1000),
    "licence, 2000 tokens": (LICENSE, 2000),
}
GENERATED = ["code", "licence, 600 tokens"]


def prompts(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """20 prompts of 1 to 2,000 tokens; a text that is shorter in this tokenizer is what it is."""
    found = {name: tokenizer.encode(text)[:count] for name, (text, count) in TEXTS.items()}
    found["random ids"] = random_tokens(120, 49152, seed=1)
    assert len(found) == 20 and max(map(len, found.values())) == 2000 and min(map(len, found.values())) == 1
    return found


def answers(llm: LLM) -> dict[str, list[int]]:
    asked = prompts(llm.tokenizer)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    before = llm.stats()["preemptions"]
    outputs = llm.generate(list(asked.values()), params, use_tqdm=False)
    assert llm.stats()["preemptions"] == before
    return dict(zip(asked, (output.outputs[0].token_ids for output in outputs), strict=True))


@torch.inference_mode()
def assert_greedy(oracle: torch.nn.Module, prompt: list[int], answer: list[int]) -> None:
    """Every token of the answer is the oracle's best, or one of two that are as good as equal."""
    logits = oracle(torch.tensor([[*prompt, *answer[:-1]]]), logits_to_keep=len(answer)).logits[0].float()
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    behind = (logits.max(dim=1).values - chosen).tolist()
    assert max(behind) < GREEDY_TIE, f"token {int(np.argmax(behind))} is {max(behind):.4f} behind the best"


@torch.inference_mode()
def assert_generated(oracle: torch.nn.Module, prompt: list[int], answer: list[int]) -> None:
    """transformers' own generate gives the same 32 tokens, up to a tie of its two best."""
    result = oracle.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        max_new_tokens=32, min_new_tokens=32, eos_token_id=None, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    expected = result.sequences[0, len(prompt) :].tolist()
    for mine, other, logits in zip(answer[:32], expected, result.logits, strict=True):
        if mine != other:
            first, second = logits[0].float().topk(2).values.tolist()
            assert first - second < GREEDY_TIE
            return


@pytest.fixture(scope="module")
def smollm2_answers(smollm2: LLM, two_threads: None) -> dict[str, list[int]]:
    return answers(smollm2)


@pytest.fixture(scope="module")
def gemma_answers(gemma: LLM, two_threads: None) -> dict[str, list[int]]:
    return answers(gemma)


@pytest.mark.parametrize("name", [*TEXTS, "random ids"])
def test_smollm2_is_greedy_where_transformers_is(
    name: str, smollm2: LLM, smollm2_answers: dict[str, list[int]], smollm2_oracle: torch.nn.Module
) -> None:
    assert len(smollm2_answers[name]) == NEW_TOKENS
    assert_greedy(smollm2_oracle, prompts(smollm2.tokenizer)[name], smollm2_answers[name])


@pytest.mark.parametrize("name", [*TEXTS, "random ids"])
def test_gemma_is_greedy_where_transformers_is(
    name: str, gemma: LLM, gemma_answers: dict[str, list[int]], gemma_oracle: torch.nn.Module
) -> None:
    assert len(gemma_answers[name]) == NEW_TOKENS
    assert_greedy(gemma_oracle, prompts(gemma.tokenizer)[name], gemma_answers[name])


@pytest.mark.parametrize("name", GENERATED)
def test_smollm2_generates_what_transformers_generates(
    name: str, smollm2: LLM, smollm2_answers: dict[str, list[int]], smollm2_oracle: torch.nn.Module
) -> None:
    assert_generated(smollm2_oracle, prompts(smollm2.tokenizer)[name], smollm2_answers[name])


@pytest.mark.parametrize("name", GENERATED)
def test_gemma_generates_what_transformers_generates(
    name: str, gemma: LLM, gemma_answers: dict[str, list[int]], gemma_oracle: torch.nn.Module
) -> None:
    assert_generated(gemma_oracle, prompts(gemma.tokenizer)[name], gemma_answers[name])


@pytest.mark.parametrize("model", ["smollm2", "gemma"])
def test_the_eager_decoder_is_greedy_where_transformers_is(model: str, request: pytest.FixtureRequest) -> None:
    """The reference backend, on the prompts of up to 64 tokens, 24 new ones each."""
    path, oracle = request.getfixturevalue(f"{model}_path"), request.getfixturevalue(f"{model}_oracle")
    llm = LLM(path, dtype="float32", backend="eager", max_num_seqs=20, kv_cache_memory_bytes=512 << 20)
    asked = [prompt for prompt in prompts(llm.tokenizer).values() if len(prompt) <= 64]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    for prompt, output in zip(asked, llm.generate(asked, params, use_tqdm=False), strict=True):
        assert_greedy(oracle, prompt, output.outputs[0].token_ids)
    nothing_left(llm.engine)


@pytest.mark.parametrize(("model", "count"), [("smollm2", 700), ("gemma", 700)])
def test_prompt_logprobs_are_those_of_transformers(model: str, count: int, request: pytest.FixtureRequest) -> None:
    llm, oracle = request.getfixturevalue(model), request.getfixturevalue(f"{model}_oracle")
    prompt = llm.tokenizer.encode(LICENSE)[:count]
    (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    with torch.inference_mode():
        hidden = oracle.model(torch.tensor([prompt])).last_hidden_state[0, :-1]
        rows = [torch.log_softmax(oracle.lm_head(part).float(), -1) for part in hidden.split(64)]
    expected = torch.cat(rows).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    found = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True) if entry]
    assert len(found) == count - 1
    assert (torch.tensor(found) - expected).abs().max() < LOGITS_FLOAT32


def test_thirty_two_requests_get_the_same_tokens_together_alone_reordered_shared_and_preempted(smollm2: LLM) -> None:
    """Eight tokens each; a difference must be a tie of the two best logprobs, as the run alone saw them."""
    engine = smollm2.engine
    text = smollm2.tokenizer.encode(LICENSE)
    asked = [text[: 40 + i] if i % 2 else text[50 * i : 50 * i + 10 + i] for i in range(32)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, logprobs=2)

    def check(found: list[list[int]]) -> None:
        for mine, other in zip(found, alone, strict=True):
            for place, (a, b) in enumerate(zip(mine, other.token_ids, strict=True)):
                if a != b:
                    assert other.logprobs is not None
                    first, second = sorted((e.logprob for e in other.logprobs[place].values()), reverse=True)[:2]
                    assert first - second < GREEDY_TIE
                    break

    def together(llm: LLM, order: list[int]) -> list[list[int]]:
        outputs = llm.generate([asked[i] for i in order], params, use_tqdm=False)
        by_place = dict(zip(order, outputs, strict=True))
        return [by_place[i].outputs[0].token_ids for i in range(32)]

    engine.scheduler.prefixes.enabled = False
    alone = [smollm2.generate(prompt, params)[0].outputs[0] for prompt in asked]
    check(together(smollm2, list(range(32))))
    engine.scheduler.prefixes.enabled = True
    check(together(smollm2, list(range(31, -1, -1))))
    check(together(smollm2, np.random.default_rng(0).permutation(32).tolist()))  # and now every prefix is cached
    nothing_left(engine)
    small = LLM(smollm2.model, dtype="float32", backend="cpu", max_num_seqs=32, kv_cache_memory_bytes=20 << 20)
    for i in range(32):
        small.engine.add(asked[i], SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, detokenize=False))
    requests = list(small.engine.requests.values())
    finish(small.engine)
    assert small.engine.scheduler.num_preemptions > 0
    check([request.sequences[0].output_token_ids[:8] for request in requests])
