"""/v1/completions: every form of prompt, echo, log-probabilities, several answers, and streams that say the same."""

import math

import pytest

from harness.serving import call, complete


def answer(reply):
    assert reply.status == 200, reply.body
    return reply.json()


def test_text_and_its_token_ids_give_the_same_answer(tiny_server):
    ids = call(tiny_server, "POST", "/tokenize", {"prompt": "hello"}).json()["tokens"]
    by_text, by_ids = answer(complete(tiny_server)), answer(complete(tiny_server, prompt=ids))
    assert by_text["choices"] == by_ids["choices"]
    assert by_text["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize("prompts", [["one", "two", "three"], [[1, 2, 3], [4, 5]]])
def test_lists_are_answered_in_order_as_one_by_one(tiny_server, prompts):
    together = answer(complete(tiny_server, prompt=prompts, n=2, seed=3, temperature=1.0))["choices"]
    assert [choice["index"] for choice in together] == list(range(2 * len(prompts)))
    alone = [answer(complete(tiny_server, prompt=p, n=2, seed=3, temperature=1.0))["choices"] for p in prompts]
    assert [c["text"] for c in together] == [c["text"] for choices in alone for c in choices]


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 3, "temperature": 1.0, "seed": 7},
        {"logprobs": 2, "max_tokens": 9},
        {"prompt": ["a", "bc"], "n": 2, "temperature": 1.0, "seed": 1},
        {"echo": True, "logprobs": 1, "max_tokens": 3},
        {"echo": True, "prompt": [70, 71], "max_tokens": 4},
        {"return_token_ids": True, "max_tokens": 5},
    ],
)
def test_streamed_pieces_put_together_are_the_whole_answer(tiny_server, fields):
    whole = answer(complete(tiny_server, **fields))
    reply = complete(tiny_server, stream=True, stream_options={"include_usage": True}, **fields)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *pieces, last = reply.events()
    assert last["choices"] == [] and last["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert all(piece["usage"] is None for piece in pieces)
    for choice in whole["choices"]:
        mine = [c for piece in pieces for c in piece["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            if choice["logprobs"] is not None:
                assert [x for c in mine for x in c["logprobs"][key]] == choice["logprobs"][key]
        if "token_ids" in choice:
            assert [x for c in mine for x in c["token_ids"]] == choice["token_ids"]


def test_echo_gives_the_prompts_log_probabilities_that_the_model_has(tiny_server, tiny_folder):
    import torch
    from transformers import AutoModelForCausalLM

    ids = list(range(60, 110))
    choice = answer(complete(tiny_server, prompt=ids, echo=True, logprobs=1, max_tokens=1))["choices"][0]
    oracle = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        rows = torch.log_softmax(oracle(torch.tensor([ids])).logits[0].double(), -1)
    found = choice["logprobs"]["token_logprobs"]
    assert found[0] is None and len(found) == len(ids) + 1
    expected = [rows[i, token].item() for i, token in enumerate(ids[1:])] + [rows[-1].max().item()]
    assert found[1:] == pytest.approx(expected, abs=1e-4)
    best = [max(entry.values()) for entry in choice["logprobs"]["top_logprobs"][1:]]
    assert best == pytest.approx(rows.max(-1).values.tolist(), abs=1e-4)


def test_echo_is_exact_when_the_prompt_is_cached(tiny_server):
    ids = list(range(100, 140))
    complete(tiny_server, prompt=ids)
    first = answer(complete(tiny_server, prompt=ids, echo=True, logprobs=1, max_tokens=1))
    assert len(first["choices"][0]["logprobs"]["token_logprobs"]) == 41


def test_echo_without_a_new_token_returns_the_prompt_alone(tiny_server):
    body = answer(complete(tiny_server, prompt="abc", echo=True, logprobs=1, max_tokens=0))
    choice = body["choices"][0]
    assert choice["text"] == "abc" and choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"] and choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 0


def test_best_of_returns_the_likeliest_answers_per_token(tiny_server):
    fields = {"temperature": 1.0, "seed": 5, "max_tokens": 6, "logprobs": 0, "ignore_eos": True}
    every = answer(complete(tiny_server, n=4, **fields))["choices"]
    best = answer(complete(tiny_server, n=2, best_of=4, **fields))["choices"]
    means = {c["text"]: math.fsum(c["logprobs"]["token_logprobs"]) / 6 for c in every}
    assert [c["text"] for c in best] == sorted(means, key=means.__getitem__, reverse=True)[:2]


def test_a_stop_string_ends_the_answer_before_it(tiny_server):
    text = answer(complete(tiny_server, max_tokens=8, ignore_eos=True, n=1))["choices"][0]["text"]
    stop = text[2:4]
    choice = answer(complete(tiny_server, max_tokens=8, ignore_eos=True, stop=[stop]))["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_prompt_log_probabilities_come_by_token_id(tiny_server):
    choice = answer(complete(tiny_server, prompt=[70, 71, 72], prompt_logprobs=1, max_tokens=1))["choices"][0]
    first, *rest = choice["prompt_logprobs"]
    assert first is None and ["71" in rest[0], "72" in rest[1]] == [True, True]


def test_tokens_can_be_named_by_their_ids(tiny_server):
    choice = answer(complete(tiny_server, logprobs=0, max_tokens=2, return_tokens_as_token_ids=True))["choices"][0]
    assert all(name.startswith("token_id:") for name in choice["logprobs"]["tokens"])


def test_a_long_prompt_can_be_cut_to_its_end(tiny_server):
    cut = answer(complete(tiny_server, prompt=list(range(50)), truncate_prompt_tokens=3))
    assert cut["usage"]["prompt_tokens"] == 3
    assert cut["choices"] == answer(complete(tiny_server, prompt=[47, 48, 49]))["choices"]


def test_usage_tells_cached_tokens_and_kv_bytes(tiny_server):
    prompt = list(range(200, 240))
    complete(tiny_server, prompt=prompt, cache_salt="usage")
    usage = answer(complete(tiny_server, prompt=prompt, cache_salt="usage", max_tokens=4, ignore_eos=True))["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 36  # whole blocks of 4, and one token is left to compute
    # 11 blocks of 4 tokens hold 40 + 3 tokens, in 4 lanes (2 layers, 2 heads) of 2 * 16 numbers, for heads of 8
    assert usage["kv"]["bytes_peak"] == 11 * 4 * 4 * 2 * 16 * 4
    assert usage["kv"]["bits_per_token"] == 4 * 2 * 16 * 32
    assert (usage["kv"]["method"], usage["kv"]["evicted_tokens"]) == ("full", 0)


def test_salts_keep_prefixes_apart(tiny_server):
    prompt = list(range(150, 190))
    counts = [
        answer(complete(tiny_server, prompt=prompt, cache_salt=salt))["usage"]["prompt_tokens_details"]["cached_tokens"]
        for salt in ("first", "second", "first")
    ]
    assert counts == [0, 0, 36]


def test_live_usage_counts_up_in_every_event(tiny_server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    reply = complete(tiny_server, stream=True, stream_options=options, max_tokens=6, ignore_eos=True)
    counts = [event["usage"]["completion_tokens"] for event in reply.events()]
    assert counts == sorted(counts) and counts[-1] == 6
    assert reply.events()[0]["usage"]["kv"]["bytes_now"] > 0


def test_a_policy_is_followed_and_told(tiny_server):
    body = answer(complete(tiny_server, prompt=list(range(100)), kv_policy="streaming(sinks=4,window=28)"))
    assert body["usage"]["kv"]["evicted_tokens"] > 0 and "streaming" in body["usage"]["kv"]["method"]


def test_the_policy_may_come_among_vllm_xargs(tiny_server):
    body = answer(complete(tiny_server, vllm_xargs={"kv_policy": "none", "strange": 1}))
    assert body["usage"]["kv"]["method"] == "full"
