"""Answers whose writing takes long: they say the same, and the event loop does not write them."""

import json
import threading

import pytest

from harness.serving import complete, converse
from kvloom.server.exchange import SLICE, encode_json, encode_large_json
from kvloom.server.logprobs import LogprobFormat

LONG = list(range(2 * SLICE + 3))


@pytest.mark.parametrize(
    "value",
    [
        None,
        "\ud800 \u00e9",
        [],
        {},
        LONG[:SLICE],
        LONG[: SLICE + 1],
        [[LONG, [LONG, [[[LONG]]]]], {"a": LONG}],
        {
            "id": 1,
            "choices": [{"logprobs": {"top": [{"x": -0.5}] * 3 * SLICE, "ids": LONG}}] * 2,
            "usage": {"kv": None},
        },
    ],
)
def test_json_in_pieces_is_the_same_json(value):
    assert encode_large_json(value) == encode_json(value)


@pytest.fixture
def writers(monkeypatch):
    """Names of the threads that write log-probabilities."""
    found = []
    for name in ("completion", "chat", "prompt"):
        monkeypatch.setattr(LogprobFormat, name, recorded(getattr(LogprobFormat, name), found))
    return found


def recorded(method, found):
    def call(*arguments):
        found.append(threading.current_thread().name)
        return method(*arguments)

    return call


PROMPTS = [[token] * 200 for token in range(4)]


@pytest.mark.parametrize("fields", [{"prompt": PROMPTS, "echo": True, "logprobs": 2}, {"prompt_logprobs": 1}])
def test_a_large_answer_is_written_off_the_event_loop(tiny_server, writers, fields):
    assert complete(tiny_server, **{"prompt": PROMPTS, **fields}, max_tokens=2).status == 200
    assert writers
    assert all(name.startswith("tokenizer") for name in writers)


def test_a_small_answer_is_written_where_it_is(tiny_server, writers):
    assert complete(tiny_server, echo=True, logprobs=1).status == 200
    assert len(writers) == 1
    assert not writers[0].startswith("tokenizer")


def test_a_long_prompt_in_a_stream_is_written_off_the_event_loop(tiny_server, writers):
    fields = {"prompt": [[7] * 250, [8] * 250], "max_tokens": 3, "echo": True, "logprobs": 1, "temperature": 0, "n": 2}
    whole = complete(tiny_server, **fields).json()["choices"]
    writers.clear()
    pieces = [event["choices"][0] for event in complete(tiny_server, **fields, stream=True).events()]
    assert sum(name.startswith("tokenizer") for name in writers) == 4  # both answers to both prompts
    for choice in whole:
        mine = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        for name in ("tokens", "token_logprobs", "text_offset"):
            assert [entry for piece in mine for entry in piece["logprobs"][name]] == choice["logprobs"][name]


def test_a_large_answer_of_a_conversation_is_written_off_the_event_loop(tiny_server, writers):
    reply = converse(tiny_server, n=4, max_tokens=120, logprobs=True, top_logprobs=2, ignore_eos=True)
    assert [len(choice["logprobs"]["content"]) for choice in json.loads(reply.body)["choices"]] == [120] * 4
    assert writers
    assert all(name.startswith("tokenizer") for name in writers)
