"""The Python API on a real model: forms of prompts, outputs, streaming, and what an interrupt leaves."""

from itertools import pairwise
from pathlib import Path

import pytest

from harness.tiny_engine import nothing_left
from kvloom import LLM, RequestOutput, SamplingParams
from kvloom.errors import InvalidInputError, KvloomError

pytestmark = [pytest.mark.real_model, pytest.mark.usefixtures("two_threads")]

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(autouse=True)
def clean(smollm2: LLM) -> None:
    """Start every test with an empty prefix cache."""
    smollm2.engine.cache.index.clear()


def ids(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def test_a_prompt_may_be_text_ids_or_a_dict_and_alone_or_in_a_list(smollm2: LLM) -> None:
    text = "The capital of France is"
    tokens = smollm2.tokenizer.encode(text)
    forms = [text, tokens, tuple(tokens), {"prompt": text}, {"prompt_token_ids": tokens, "cache_salt": "x"}]
    (expected,) = smollm2.generate(text, GREEDY)
    assert expected.prompt == text and expected.prompt_token_ids == tokens and expected.finished
    assert "Paris" in expected.outputs[0].text
    assert expected.outputs[0].text == smollm2.tokenizer.decode(ids(expected))
    for form in forms[1:]:
        (output,) = smollm2.generate(form, GREEDY)  # type: ignore[arg-type]
        assert ids(output) == ids(expected)
    several = smollm2.generate([text, {"prompt_token_ids": tokens}, tokens], GREEDY)  # type: ignore[list-item]
    assert [ids(output) for output in several] == [ids(expected)] * 3
    assert [output.prompt for output in several] == [text, None, None]
    assert smollm2.generate([], GREEDY) == []


def test_each_prompt_may_have_its_own_parameters_and_outputs_come_in_order(smollm2: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (9, 2, 5)]
    outputs = smollm2.generate(["One", "Two", "Three"], params)
    assert [(o.prompt, len(ids(o))) for o in outputs] == [("One", 9), ("Two", 2), ("Three", 5)]


def test_usage_says_what_the_cache_did(smollm2: LLM) -> None:
    prompt = list(range(100, 200))
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    (first,), (second,) = smollm2.generate(prompt, params), smollm2.generate(prompt, params)
    block = 16 * 128 * 4
    assert first.kv.bytes_peak == second.kv.bytes_peak == 90 * 9 * block  # 129 tokens: nine blocks in each lane
    assert (first.kv.bytes_now, first.kv.cached_tokens, second.kv.cached_tokens) == (0, 0, 96)
    assert (first.kv.evicted_tokens, first.kv.preemptions, first.kv.bits_per_element) == (0, 0, 32.0)
    assert ids(first) == ids(second)
    stats = smollm2.stats()
    assert stats["kv_bytes_in_use"] == stats["requests_running"] == stats["requests_waiting"] == 0
    assert stats["kv_bytes_cached"] == 90 * 8 * block  # 128 tokens closed eight blocks


def test_chat_answers_through_the_template_of_the_model(smollm2: LLM) -> None:
    messages = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    (output,) = smollm2.chat(messages, SamplingParams(temperature=0, max_tokens=20))
    assert output.outputs[0].text == "The capital of France is Paris."  # and no mark of the template
    assert output.outputs[0].finish_reason == "stop"
    both = smollm2.chat([messages, messages], SamplingParams(temperature=0, max_tokens=20))
    assert [o.outputs[0].text for o in both] == ["The capital of France is Paris."] * 2


def test_a_stream_grows_token_by_token_to_what_generate_returns(smollm2: LLM) -> None:
    (expected,) = smollm2.generate("Once upon a time", GREEDY)
    seen = list(smollm2.stream("Once upon a time", GREEDY))
    assert [len(ids(output)) for output in seen] == list(range(1, 9))
    assert [output.finished for output in seen] == [False] * 7 + [True]
    assert all(b.outputs[0].text.startswith(a.outputs[0].text) for a, b in pairwise(seen))
    assert seen[-1].outputs[0] == expected.outputs[0]


def test_a_stream_that_others_stepped_still_ends_with_all_its_tokens(smollm2: LLM) -> None:
    stream = smollm2.stream("Once upon a time", GREEDY)
    first = next(stream)
    smollm2.generate("Something else entirely", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    rest = list(stream)
    assert len(ids(first)) == 1 and rest[-1].finished and len(ids(rest[-1])) == 8


def test_a_stream_that_is_closed_early_is_aborted(smollm2: LLM) -> None:
    stream = smollm2.stream("Once upon a time", GREEDY)
    next(stream)
    assert smollm2.stats()["requests_running"] == 1
    stream.close()  # type: ignore[attr-defined]
    nothing_left(smollm2.engine)


def test_ctrl_c_in_generate_leaves_nothing(smollm2: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    honest = smollm2.engine.runner.model.step

    def interrupted(*args: object) -> object:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return honest(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(smollm2.engine.runner.model, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            smollm2.generate([f"Prompt number {i}" for i in range(40)], SamplingParams(n=2, max_tokens=20))
    nothing_left(smollm2.engine)
    assert "Paris" in smollm2.generate("The capital of France is", GREEDY)[0].outputs[0].text


def test_one_bad_prompt_of_several_runs_none_and_leaves_nothing(smollm2: LLM) -> None:
    before = smollm2.stats()["steps"]
    with pytest.raises(InvalidInputError, match="the prompt is empty"):
        smollm2.generate(["fine", "also fine", ""], GREEDY)
    assert smollm2.stats()["steps"] == before
    nothing_left(smollm2.engine)


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ("", GREEDY, "the prompt is empty"),
        ([[]], GREEDY, "the prompt is empty"),
        (5, GREEDY, "prompts are text, token ids, dicts or a list of these, not int"),
        (None, GREEDY, "not NoneType"),
        (b"bytes", GREEDY, "not bytes"),
        ([None], GREEDY, "a prompt is text, a list of token ids or a dict"),
        ([b"bytes"], GREEDY, "not bytes"),
        ([1.5], GREEDY, "not float"),
        ([[1.5]], GREEDY, "1.5 is not a token id"),
        ([["The"]], GREEDY, "'The' is not a token id"),
        ([49152], GREEDY, "49152 is not a token id; this model has ids 0 to 49151"),
        ({"prompt": 5}, GREEDY, "the text to encode is int"),
        ({"prompt": None}, GREEDY, "the text to encode is NoneType"),
        ({"prompt": "a", "prompt_token_ids": [1]}, GREEDY, "a prompt has either"),
        ({"text": "a"}, GREEDY, "a prompt has either"),
        ({"prompt_token_ids": 5}, GREEDY, "not int"),
        ({"prompt_token_ids": "12"}, GREEDY, "not str"),
        ({"prompt": "a", "cache_salt": 1}, GREEDY, "cache_salt must be str"),
        ({"prompt": "a", "priority": 1.5}, GREEDY, "priority must be int"),
        ({"prompt": "half a pair \ud800"}, GREEDY, "surrogate"),
        ("a", {"temperature": 0}, "sampling_params must be SamplingParams, not dict"),
        ("a", 5, "sampling_params must be SamplingParams, not int"),
        ("a", [GREEDY, GREEDY], "1 prompts need as many sampling_params, or one; got 2"),
        ([1] * 8200, GREEDY, "the prompt has 8200 tokens; the model's length is 8192"),
    ],
)
def test_wrong_prompts_and_parameters_are_named(smollm2: LLM, prompts: object, params: object, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        smollm2.generate(prompts, params)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2 and isinstance(caught.value, KvloomError)
    nothing_left(smollm2.engine)


def test_a_model_is_a_name_or_a_path(smollm2: LLM, smollm2_path: Path) -> None:
    assert smollm2.model == str(smollm2_path)
    with pytest.raises(InvalidInputError, match="model must be a name or a path, not int"):
        LLM(5)  # type: ignore[arg-type]
