"""SmolLM2 and Gemma 3 270M: the same greedy tokens as transformers in float32, on prompts of every kind and length.

What transformers generates is a golden figure; a token may differ only where its two best logits are a tie.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from harness.golden import digest, golden
from harness.real_prompts import LICENSE, PROMPTS, SCORED_TOKENS, prompts
from harness.tiny_engine import assert_same_unless_tied, finish, nothing_left
from harness.tolerances import GREEDY_TIE, LOGITS_FLOAT32
from kvloom import LLM, SamplingParams

pytestmark = [pytest.mark.real_model, pytest.mark.usefixtures("two_threads"), pytest.mark.timeout(900)]

MODELS = ["smollm2", "gemma"]
TOKENS = 32
"""Of each answer; the golden ones have 64."""


def assert_answers(expected: dict[str, Any], prompt: list[int], found: list[int]) -> None:
    """Assert that `found` are the first golden tokens after `prompt`, up to a tie."""
    assert digest(prompt) == expected["prompt"]
    assert_same_unless_tied(found, expected["tokens"][: len(found)], expected["margins"])


@pytest.fixture(scope="module")
def answers(two_threads: None) -> Callable[[LLM], dict[str, list[int]]]:
    """Return a function that gives the answers of a model to all prompts, computed together at its first call."""

    @cache
    def computed(llm: LLM) -> dict[str, list[int]]:
        asked = prompts(llm.tokenizer)
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
        before = llm.stats()["preemptions"]
        outputs = llm.generate(list(asked.values()), params, use_tqdm=False)
        assert llm.stats()["preemptions"] == before
        return dict(zip(asked, (output.outputs[0].token_ids for output in outputs), strict=True))

    return computed


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("model", MODELS)
def test_the_kernels_generate_what_transformers_generates(
    model: str, name: str, answers: Callable[[LLM], dict[str, list[int]]], request: pytest.FixtureRequest
) -> None:
    llm = request.getfixturevalue(model)
    found = answers(llm)[name]
    assert len(found) == TOKENS
    assert_answers(golden(model)["answers"][name], prompts(llm.tokenizer)[name], found)


@pytest.mark.parametrize("model", MODELS)
def test_the_eager_decoder_generates_what_transformers_generates(model: str, request: pytest.FixtureRequest) -> None:
    """The reference backend, on the prompts of up to 64 tokens, 16 new ones each."""
    path = request.getfixturevalue(f"{model}_path")
    llm = LLM(path, dtype="float32", backend="eager", max_num_seqs=20, kv_cache_memory_bytes=512 << 20)
    asked = {name: prompt for name, prompt in prompts(llm.tokenizer).items() if len(prompt) <= 64}
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    outputs = llm.generate(list(asked.values()), params, use_tqdm=False)
    for (name, prompt), output in zip(asked.items(), outputs, strict=True):
        assert_answers(golden(model)["answers"][name], prompt, output.outputs[0].token_ids)
    nothing_left(llm.engine)


@pytest.mark.parametrize("model", MODELS)
def test_prompt_logprobs_are_those_of_transformers(model: str, request: pytest.FixtureRequest) -> None:
    llm, expected = request.getfixturevalue(model), golden(model)["scores"]
    prompt = llm.tokenizer.encode(LICENSE)[:SCORED_TOKENS]
    assert digest(prompt) == expected["prompt"]
    (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    found = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True) if entry]
    assert len(found) == SCORED_TOKENS - 1
    assert (torch.tensor(found) - torch.tensor(expected["logprobs"])).abs().max() < LOGITS_FLOAT32


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


def test_8_bit_blocks_leave_nearly_every_greedy_token_as_it_is(smollm2: LLM) -> None:
    text, start = smollm2.tokenizer.encode(LICENSE)[:500], 400
    params = SamplingParams(temperature=0, max_tokens=100, logprobs=1, detokenize=False)
    found = []
    for policy in ("full", "int8", "fp8_e4m3"):
        prompt = {"prompt_token_ids": text[:start], "forced_token_ids": text[start:], "kv_policy": policy}
        (output,) = smollm2.generate(prompt, params, use_tqdm=False)
        assert output.kv.method == policy and output.outputs[0].logprobs is not None
        found.append(output.outputs[0].logprobs)
    best = [[min(entry.items(), key=lambda item: item[1].rank)[0] for entry in entries] for entries in found]
    of_text = [[entry[token].logprob for entry, token in zip(e, text[start:], strict=True)] for e in found]
    for i, same, most in ((1, 95, 0.05), (2, 90, 0.1)):
        assert sum(one == other for one, other in zip(best[0], best[i], strict=True)) >= same
        assert 0 < sum(abs(one - other) for one, other in zip(of_text[0], of_text[i], strict=True)) / 100 < most
