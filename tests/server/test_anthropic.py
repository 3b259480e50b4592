"""Anthropic's /v1/messages: blocks in and out, the events of a stream, errors in its shape, and counted tokens."""

import json

import pytest

from harness.serving import call, converse, make_llm, running

ADD = {
    "name": "add",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["a"],
        "additionalProperties": False,
    },
}
CALL = {"type": "tool_use", "id": "t", "name": "add", "input": {"a": 1}}
HELLO = [{"role": "user", "content": "hello"}]
TEXT_EVENTS = [
    "message_start",
    "content_block_start",
    "content_block_delta",
    "content_block_stop",
    "message_delta",
    "message_stop",
]


def say(server, headers=None, **fields):
    """POST /v1/messages."""
    body = {"messages": HELLO, "temperature": 0, "max_tokens": 8, **fields}
    return call(server, "POST", "/v1/messages", body, headers)


def answer(reply):
    assert reply.status == 200, reply.body
    return reply.json()


def named_events(reply):
    """The (name, value) of each event of a stream."""
    events = [part.split(b"\n") for part in reply.body.split(b"\n\n") if part.startswith(b"event: ")]
    return [(name[7:].decode(), json.loads(data[6:])) for name, data in events]


def test_an_answer_is_the_conversations_answer(tiny_server):
    said = answer(converse(tiny_server))
    body = answer(say(tiny_server))
    assert body["content"] == [{"type": "text", "text": said["choices"][0]["message"]["content"], "citations": None}]
    assert (body["role"], body["stop_reason"], body["stop_sequence"]) == ("assistant", "max_tokens", None)
    usage = body["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == said["usage"]["prompt_tokens"]
    assert usage["output_tokens"] == 8 and usage["kv"]["method"] == "full"


def test_blocks_become_the_messages_that_they_stand_for(tiny_server):
    """The template writes role and content, so that equal counts of tokens mean equal prompts."""
    blocks = [
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": [CALL]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "3"}]},
                {"type": "text", "text": "so"},
            ],
        },
    ]
    messages = [
        {"role": "system", "content": "short"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": "3"},
        {"role": "user", "content": "so"},
    ]
    fields = {"messages": blocks, "system": [{"type": "text", "text": "short", "cache_control": {"type": "ephemeral"}}]}
    reply = say(tiny_server, **fields)
    said = answer(converse(tiny_server, messages=messages))
    assert answer(reply)["content"][0]["text"] == said["choices"][0]["message"]["content"]
    assert "kvloom-warning" not in reply.headers
    counted = call(tiny_server, "POST", "/v1/messages/count_tokens", fields)
    assert answer(counted) == {"input_tokens": said["usage"]["prompt_tokens"]}


def test_a_last_message_of_the_assistant_is_continued(tiny_server):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "so far"}]
    fields = {"messages": messages}
    counted = answer(call(tiny_server, "POST", "/v1/messages/count_tokens", fields))
    assert counted == {"input_tokens": len("<user>a\n<assistant>so far")}


def test_a_streamed_answer_has_the_events_of_the_api_and_is_the_whole_one(tiny_server):
    whole = answer(say(tiny_server))
    events = named_events(say(tiny_server, stream=True))
    assert list(dict.fromkeys(name for name, _ in events)) == TEXT_EVENTS
    assert all(value["type"] == name for name, value in events)
    text = "".join(value["delta"]["text"] for name, value in events if name == "content_block_delta")
    assert text == whole["content"][0]["text"]
    ending = events[-2][1]
    assert ending["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert ending["usage"]["output_tokens"] == 8


def test_a_forced_call_comes_whole_and_in_pieces(calling_server):
    fields = {"tools": [ADD], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "max_tokens": 200}
    fields |= {"temperature": 1.0, "seed": 3}
    body = answer(say(calling_server, **fields))
    [block] = body["content"]
    assert (block["type"], block["name"], body["stop_reason"]) == ("tool_use", "add", "tool_use")
    assert list(block["input"]) == ["a"]
    events = named_events(say(calling_server, stream=True, **fields))
    pieces = [value["delta"]["partial_json"] for name, value in events if name == "content_block_delta"]
    assert len(pieces) > 1 and json.loads("".join(pieces)) == block["input"]


def test_a_call_that_is_cut_off_has_no_input_and_a_warning(calling_server):
    tools = {"tools": [ADD], "tool_choice": {"type": "tool", "name": "add"}}
    reply = say(calling_server, max_tokens=34, **tools)
    [block] = answer(reply)["content"]
    assert (block["input"], reply.json()["stop_reason"]) == ({}, "max_tokens")
    assert "cut off" in reply.headers["kvloom-warning"]


def test_a_stop_sequence_is_named(tiny_server):
    text = answer(say(tiny_server))["content"][0]["text"]
    body = answer(say(tiny_server, stop_sequences=["never", text[3]]))
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", text[3])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "has no 'max_tokens'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'assistant'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'tool_result'"),
        ({"messages": [{"role": "user", "content": [CALL]}]}, "role"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "'custom'"),
        ({"mcp_servers": [{"name": "x"}]}, "mcp_servers is not supported"),
        ({"messages": [{"role": "user", "content": "x" * 400}]}, "maximum context length"),
    ],
)
def test_what_is_wrong_is_refused_in_the_shape_of_the_api(tiny_server, fields, words):
    reply = say(tiny_server, **fields)
    body = reply.json()
    assert (reply.status, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")
    assert words in body["error"]["message"]


def test_keys_are_taken_from_either_header_and_their_errors_have_the_shape_of_the_api(tiny_folder):
    with running(make_llm(tiny_folder), api_key=("right",)) as server:
        reply = say(server, {"x-api-key": "wrong"})
        assert (reply.status, reply.json()["error"]["type"]) == (401, "authentication_error")
        for header in ({"x-api-key": "right"}, {"Authorization": "Bearer right"}):
            assert say(server, header).status == 200


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"max_token": 3}, "max_token"),
        ({"messages": [{"role": "user", "content": "a", "nam": "x"}]}, "messages[0].nam"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "txt": 1}]}]}, "content[0].txt"),
        ({"tools": [{**ADD, "schema": {}}], "tool_choice": {"type": "none"}}, "tools[0].schema"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"output_config": {"effort": "low"}}, "reasoning_effort"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking"}]}]}, "content[0]"),
    ],
)
def test_what_has_no_effect_is_named_in_a_warning(tiny_server, fields, path):
    reply = say(tiny_server, **fields)
    assert reply.status == 200 and path in reply.headers["kvloom-warning"], reply


def test_embeddings_are_refused_with_what_computes_them(tiny_server):
    reply = call(tiny_server, "POST", "/v1/embeddings", {"model": "tiny", "input": "x"})
    error = reply.json()["error"]
    assert (reply.status, error["code"]) == (400, "unsupported") and "embedding model" in error["message"]
