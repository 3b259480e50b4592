"""/v1/responses: items in and out, the events of a stream, and what only a server that keeps answers could do."""

import json

import openai
import pytest

from harness.serving import call, converse

ADD = {
    "type": "function",
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["a"],
        "additionalProperties": False,
    },
}
TEXT_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.incomplete",
]
CALL_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
    "response.completed",
]


def respond(server, given="hello", **fields):
    """POST /v1/responses."""
    body = {"input": given, "temperature": 0, "max_output_tokens": 8, **fields}
    return call(server, "POST", "/v1/responses", body)


def answer(reply):
    assert reply.status == 200, reply.body
    return reply.json()


def named_events(reply):
    """The (name, value) of each event of a stream."""
    events = [part.split(b"\n") for part in reply.body.split(b"\n\n") if part.startswith(b"event: ")]
    return [(name[7:].decode(), json.loads(data[6:])) for name, data in events]


def without_ids(response):
    """A response without what differs from one to the next."""
    left = {name: value for name, value in response.items() if name not in ("id", "created_at", "completed_at")}
    items = [{n: v for n, v in item.items() if n not in ("id", "call_id")} for item in left.pop("output")]
    cached = left["usage"].pop("kv"), left["usage"].pop("input_tokens_details")
    assert all(cached)
    return left, items


def test_an_answer_is_the_conversations_answer(tiny_server):
    said = answer(converse(tiny_server))
    body = answer(respond(tiny_server))
    [item] = body["output"]
    assert item["content"][0]["text"] == said["choices"][0]["message"]["content"]
    assert (body["status"], item["status"]) == ("incomplete", "incomplete")
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["usage"]["input_tokens"] == said["usage"]["prompt_tokens"]
    assert body["usage"]["output_tokens"] == 8 and body["usage"]["kv"]["method"] == "full"
    assert body["store"] is False and body["previous_response_id"] is None


def test_items_become_the_messages_that_they_stand_for(tiny_server):
    """The template writes role and content, so that equal counts of tokens mean equal prompts."""
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hel"}, {"type": "input_text", "text": "lo"}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "content": [{"type": "output_text", "text": "so"}]},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "3"},
    ]
    messages = [
        {"role": "system", "content": "short"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "so"},
        {"role": "tool", "content": "3"},
    ]
    body = answer(respond(tiny_server, items, instructions="short"))
    said = answer(converse(tiny_server, messages=messages))
    assert body["usage"]["input_tokens"] == said["usage"]["prompt_tokens"]
    assert body["output"][0]["content"][0]["text"] == said["choices"][0]["message"]["content"]


def test_a_streamed_answer_has_the_events_of_the_api_and_ends_as_the_whole_one(tiny_server):
    whole = answer(respond(tiny_server))
    events = named_events(respond(tiny_server, stream=True))
    assert list(dict.fromkeys(name for name, _ in events)) == TEXT_EVENTS
    assert [value["sequence_number"] for _, value in events] == list(range(len(events)))
    assert all(value["type"] == name for name, value in events)
    text = "".join(value["delta"] for name, value in events if name == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"]
    assert without_ids(events[-1][1]["response"]) == without_ids(whole)


def test_a_streamed_call_comes_in_pieces_and_ends_as_the_whole_one(calling_server):
    fields = {"tools": [ADD], "tool_choice": {"type": "function", "name": "add"}, "max_output_tokens": 200}
    fields |= {"temperature": 1.0, "seed": 3}
    whole = answer(respond(calling_server, **fields))
    [item] = whole["output"]
    assert (item["type"], item["name"], item["status"]) == ("function_call", "add", "completed")
    assert list(json.loads(item["arguments"])) == ["a"]
    events = named_events(respond(calling_server, stream=True, **fields))
    assert list(dict.fromkeys(name for name, _ in events)) == CALL_EVENTS
    pieces = [value["delta"] for name, value in events if name == "response.function_call_arguments.delta"]
    assert len(pieces) > 1 and "".join(pieces) == item["arguments"]
    assert without_ids(events[-1][1]["response"]) == without_ids(whole)


def test_a_format_binds_the_answer(calling_server):
    schema = {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"], "additionalProperties": False}
    form = {"format": {"type": "json_schema", "name": "one", "schema": schema}}
    body = answer(respond(calling_server, text=form, temperature=1.0, max_output_tokens=100))
    assert json.loads(body["output"][0]["content"][0]["text"]) == {"x": 1}
    assert body["text"] == form and body["status"] == "completed"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation"),
        ({"conversation": "c"}, "conversation", "whole"),
        ({"background": True}, "background", "later"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input", "store=false"),
        ({"input": [{"type": "web_search_call"}]}, "input", "'function_call_output'"),
        ({"input": [{"type": "function_call_output", "call_id": "c9", "output": ""}]}, "input", "'c9'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "'input_text'"),
        ({"input": None}, "input", "has no 'input'"),
        ({"tools": [{"type": "web_search"}]}, "tools", "'function'"),
        ({"include": ["message.output_text.logprobs"]}, "include", "chat"),
        ({"text": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, None, "'/not'"),
        ({"input": "x" * 400}, "input", "maximum context length"),
    ],
)
def test_what_is_not_kept_or_not_known_is_refused_under_its_own_name(tiny_server, fields, param, words):
    reply = respond(tiny_server, **fields)
    error = reply.json()["error"]
    assert (reply.status, error["param"]) == (400, param) and words in error["message"], error


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"max_tokens": 3}, "max_tokens"),
        ({"input": [{"role": "user", "content": "a", "nam": "x"}]}, "input[0].nam"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "a", "txt": 1}]}]}, "content[0].txt"),
        ({"text": {"formt": {}}}, "text.formt"),
        ({"tools": [{**ADD, "paramters": {}}], "tool_choice": "none"}, "tools[0].paramters"),
        ({"store": True}, "store"),
        ({"reasoning": {"effort": "low"}}, "reasoning_effort"),
        ({"include": ["reasoning.encrypted_content"]}, "reasoning.encrypted_content"),
        ({"input": [{"role": "user", "content": "a"}, {"type": "reasoning", "summary": []}]}, "input[1]"),
    ],
)
def test_what_has_no_effect_is_named_in_a_warning(tiny_server, fields, path):
    reply = respond(tiny_server, **fields)
    assert reply.status == 200 and path in reply.headers["kvloom-warning"], reply


def test_the_openai_client_reads_answers_streams_and_parsed_objects(calling_server):
    from pydantic import BaseModel

    class Flag(BaseModel):
        on: bool

    with openai.OpenAI(base_url=f"{calling_server.url}/v1", api_key="none", max_retries=0) as client:
        fields = {"model": "tiny", "input": "hello", "temperature": 0, "max_output_tokens": 60}
        parsed = client.responses.parse(**fields, text_format=Flag)
        with client.responses.stream(**fields, text_format=Flag) as stream:
            deltas = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            final = stream.get_final_response()
    assert deltas == final.output_text == parsed.output_text
    assert isinstance(final.output_parsed, Flag) and final.output_parsed == parsed.output_parsed
