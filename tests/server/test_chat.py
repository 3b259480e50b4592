"""/v1/chat/completions: templates, log-probabilities, tools, and streams that say the same."""

import pytest

from harness.serving import converse, make_llm, make_model, running


def answer(reply):
    assert reply.status == 200, reply.body
    return reply.json()


@pytest.mark.parametrize("fields", [{}, {"n": 2, "temperature": 1.0, "seed": 4}, {"logprobs": True, "top_logprobs": 2}])
def test_streamed_pieces_put_together_are_the_whole_answer(tiny_server, fields):
    whole = answer(converse(tiny_server, **fields))
    *pieces, last = converse(tiny_server, stream=True, stream_options={"include_usage": True}, **fields).events()
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for choice in whole["choices"]:
        mine = [c for piece in pieces for c in piece["choices"] if c["index"] == choice["index"]]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
        if choice["logprobs"]:
            content = [entry for c in mine if c["logprobs"] for entry in c["logprobs"]["content"]]
            assert content == choice["logprobs"]["content"]


def test_log_probabilities_come_with_bytes_and_the_best_tokens(tiny_server):
    content = answer(converse(tiny_server, logprobs=True, top_logprobs=3))["choices"][0]["logprobs"]["content"]
    assert len(content) == 8 and all(len(entry["top_logprobs"]) == 3 for entry in content)
    assert all(entry["top_logprobs"][0]["logprob"] == entry["logprob"] for entry in content)  # greedy


def test_parts_of_text_are_one_text(tiny_server):
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    assert answer(converse(tiny_server, messages=parts))["choices"] == answer(converse(tiny_server))["choices"]


def test_max_completion_tokens_wins_over_max_tokens(tiny_server):
    body = answer(converse(tiny_server, max_completion_tokens=3, max_tokens=7, ignore_eos=True))
    assert body["usage"]["completion_tokens"] == 3


def test_the_last_message_can_be_continued(tiny_server):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "so far"}]
    body = answer(converse(tiny_server, messages=messages, continue_final_message=True))
    assert body["usage"]["prompt_tokens"] == len("<user>a\n<assistant>so far")


def test_a_model_without_a_template_refuses_conversations(tmp_path):
    with running(make_llm(make_model(tmp_path, template=None))) as server:
        reply = converse(server)
        assert (reply.status, reply.json()["error"]["code"]) == (400, "chat_template")
