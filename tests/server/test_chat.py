"""/v1/chat/completions: templates, log-probabilities, tools, and streams that say the same."""

import json

import pytest

from harness.serving import converse, make_llm, make_model, running
from kvloom.errors import UnsupportedError
from kvloom.server.fields import Body
from kvloom.server.tools import ToolCallReader, offered_tools

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


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


def test_tools_reach_the_template_that_has_them(tiny_server):
    plain, offered = answer(converse(tiny_server)), answer(converse(tiny_server, tools=[TOOL]))
    assert offered["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] + 50
    assert answer(converse(tiny_server, tools=[TOOL], tool_choice="none"))["choices"] == plain["choices"]


def test_a_template_without_tools_refuses_them_with_all_reasons():
    with pytest.raises(UnsupportedError) as refused:
        offered_tools(Body({"tools": [{"type": "other"}]}), "{{ messages }}")
    assert len(refused.value.reasons) == 2


def test_forced_calls_are_refused(tiny_server):
    assert converse(tiny_server, tools=[TOOL], tool_choice="required").status == 400


@pytest.mark.parametrize("size", [1, 3, 7, 200])
def test_calls_are_read_the_same_however_the_text_is_cut(size):
    call = {"name": "add", "arguments": {"a": 1}}
    text = f"well <tool_call>\n{json.dumps(call)}\n</tool_call> and <tool_call>no call</tool_call> < end"
    reader, content, calls = ToolCallReader(), "", []
    for start in range(0, len(text), size):
        more, found = reader.read(text[start : start + size], start + size >= len(text))
        content, calls = content + more, calls + found
    assert content == "well  and <tool_call>no call</tool_call> < end"
    assert [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls] == [("add", {"a": 1})]


def test_an_unfinished_call_at_the_end_is_content():
    reader = ToolCallReader()
    assert reader.read("a<tool_call>{", False) == ("a", [])
    assert reader.read('"x"', True) == ('<tool_call>{"x"', [])
