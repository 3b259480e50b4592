"""Streams of events without tokens, and unknown entries of bodies."""

import asyncio

from harness.serving import complete, converse
from kvloom.server.dialect import COMPLETIONS
from kvloom.server.eventstream import EventStream
from kvloom.server.watchdog import Watchdog

TOOLS = [{"type": "function", "function": {"name": "x"}}]
NAMED = {"type": "function", "function": {"name": "x"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "minimun": 3}}, "requierd": ["a"]}


def test_comments_are_sent_while_an_answer_is_silent():
    sent = []

    async def run():
        gate = asyncio.Event()

        async def events():
            yield b"data: 1\n\n"
            await gate.wait()
            yield b"data: 2\n\n"

        async def send(message):
            sent.append(message.get("body", b""))
            if sent.count(b": waiting\n\n") == 3:
                gate.set()

        async def receive():
            await asyncio.Event().wait()

        await EventStream(events(), Watchdog(60), COMPLETIONS, silence=0.02)({}, receive, send)

    asyncio.run(run())
    assert [part for part in sent if b"data" in part] == [b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n"]
    assert sent.count(b": waiting\n\n") >= 3


def warning(reply):
    assert reply.status == 200, reply.body
    return reply.headers.get("kvloom-warning", "")


def test_unknown_entries_are_warned_about_at_every_depth(tiny_server):
    said = warning(complete(tiny_server, max_tokens=1, stream=True, stream_options={"include_usgae": True}))
    assert "'stream_options.include_usgae'" in said and "'include_usage'" in said
    said = warning(complete(tiny_server, max_tokens=1, response_format={"type": "json_object", "schema": {}}))
    assert "'response_format.schema'" in said
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "srtict": True}}
    said = warning(complete(tiny_server, max_tokens=1, response_format=format))
    assert "'response_format.json_schema.srtict'" in said and "/requierd" in said and "/properties/a/minimun" in said
    said = warning(converse(tiny_server, max_tokens=1, tools=TOOLS, tool_choice={**NAMED, "fucntion": {}}))
    assert "'tool_choice.fucntion'" in said


def test_unknown_fields_of_messages_are_warned_about_and_those_of_earlier_answers_are_not(tiny_server):
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [part], "contents": "x"},
        {"role": "assistant", "content": "b", "wieght": 1},
    ]
    said = warning(converse(tiny_server, messages=messages, max_tokens=1))
    assert "'messages[0].contents'" in said and "'messages[1].wieght'" in said
    assert "'messages[0].content[0].cache_control'" in said
    earlier = {
        "role": "assistant",
        "content": "b",
        "refusal": None,
        "annotations": [],
        "tool_calls": None,
        "audio": None,
    }
    user = {"role": "user", "content": "x", "name": "ann"}
    assert warning(converse(tiny_server, messages=[user, earlier, user], max_tokens=1)) == ""


def test_a_long_warning_is_cut_to_a_header_wherever_the_cut_falls(tiny_server):
    for length in range(1, 60):  # no word of a warning is as long: a cut falls behind a space
        message = {"role": "user", "content": "Hi", "x" * length: 1} | {f"{'y' * 25}{i}": 1 for i in range(60)}
        reply = converse(tiny_server, messages=[message] * 3, max_tokens=1)
        assert reply.status == 200 and warning(reply) == warning(reply).strip() != ""
