"""Places of the queue, and refusals that wait neither for other bodies nor for the rest of their own."""

import gc
import json
import socket
import threading
from contextlib import contextmanager

import pytest

from harness.serving import call, complete, in_background, make_llm, running, until
from kvloom.server.queue import Queue
from kvloom.server.refusal import Refusal
from kvloom.server.serve import spare_collections


def test_places_of_a_body_are_taken_while_it_is_looked_at_and_given_back():
    queue = Queue(3)
    with queue.place() as place:
        assert (len(queue), place.size) == (1, 1)
        place.widen(3)
        assert (len(queue), place.size) == (3, 3)
        with pytest.raises(Refusal) as refused:
            queue.place()
        assert (refused.value.status, refused.value.code) == (429, "queue_full")
        place.leave()
        assert len(queue) == 0
    assert len(queue) == 0


def test_a_place_that_cannot_be_widened_stays_as_it_is():
    queue = Queue(2)
    with queue.place() as place:
        with pytest.raises(Refusal):
            place.widen(3)
        assert (len(queue), place.size) == (1, 1)
        place.widen(2)
        place.widen(1)
        assert place.size == 2


@contextmanager
def pool_held(server):
    """Keep the threads that parse and tokenise busy."""
    gate = threading.Event()
    busy = [server.service.workers.pool.submit(gate.wait, 60) for _ in range(server.service.workers.pool._max_workers)]
    try:
        yield
    finally:
        gate.set()
        assert all(future.result(60) for future in busy)


def test_who_finds_the_queue_full_does_not_wait_behind_the_prompts_of_others(tiny_folder):
    with running(make_llm(tiny_folder), max_num_queued_reqs=2) as server:
        with pool_held(server):
            threads = [in_background(complete, server), in_background(complete, server)]
            until(lambda: len(server.service.queue) == 2)
            refused = complete(server)  # answered although no thread could have tokenised it
            assert (refused.status, refused.json()["error"]["code"]) == (429, "queue_full")
            assert server.service.num_live == 0
        for thread, replies in threads:
            thread.join(60)
            assert replies[0].status == 200
        assert len(server.service.queue) == 0


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"prompt": [1] * 1000}, 400),
        ({"prompt": []}, 400),
        ({"temperature": "hot"}, 400),
        ({"model": "nobody"}, 404),
        ({"prompt": ["a"] * 3}, 429),
        ({"prompt": "a" * 100_000}, 400),
        ({}, 200),
        ({"stream": True}, 200),
    ],
)
def test_every_body_gives_its_place_back(one_place, fields, status):
    assert complete(one_place, **fields).status == status
    until(lambda: len(one_place.service.queue) == 0)


@pytest.fixture(scope="module")
def one_place(tiny_folder):
    with running(make_llm(tiny_folder), max_num_queued_reqs=1) as server:
        yield server


def test_a_client_that_leaves_while_its_prompt_is_tokenised_gives_its_place_back(tiny_folder):
    with running(make_llm(tiny_folder), max_num_queued_reqs=1) as server, pool_held(server):
        sock = connected(server)
        body = json.dumps({"prompt": "a"}).encode()
        sock.sendall(head(len(body)) + body)
        until(lambda: len(server.service.queue) == 1)
        sock.close()
        until(lambda: len(server.service.queue) == 0)


def connected(server):
    return socket.create_connection(("127.0.0.1", server.port), 60)


def head(length, *lines):
    first = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*first, f"Content-Length: {length}", *lines, "", ""]).encode()


def read_reply(sock):
    """Return the bytes of one whole reply and no more."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += sock.recv(1)
    length = int(received.lower().partition(b"content-length:")[2].split()[0])
    while len(received.partition(b"\r\n\r\n")[2]) < length:
        received += sock.recv(1)
    return received


def test_a_refusal_is_complete_before_the_rest_of_the_body_comes_and_the_connection_stays_good(tiny_folder):
    with running(make_llm(tiny_folder), max_body_bytes=1024) as server, connected(server) as sock:
        sock.sendall(head(5000) + b"x" * 10)
        assert read_reply(sock).startswith(b"HTTP/1.1 413 ")
        assert server.service.num_open == 1  # still hearing the client out
        sock.sendall(b"x" * 4990)
        body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
        sock.sendall(head(len(body)) + body)
        assert read_reply(sock).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_is_refused_is_not_asked_for(tiny_folder):
    with running(make_llm(tiny_folder), max_body_bytes=1024) as server, connected(server) as sock:
        sock.sendall(head(5000, "Expect: 100-continue"))
        assert read_reply(sock).startswith(b"HTTP/1.1 413 ")
        until(lambda: server.service.num_open == 0)


def test_a_body_that_is_wanted_is_asked_for(tiny_folder):
    with running(make_llm(tiny_folder)) as server, connected(server) as sock:
        body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
        sock.sendall(head(len(body), "Expect: 100-continue"))
        invitation = b""
        while not invitation.endswith(b"\r\n\r\n"):
            invitation += sock.recv(1)
        assert invitation.startswith(b"HTTP/1.1 100 ")
        sock.sendall(body)
        assert read_reply(sock).startswith(b"HTTP/1.1 200 ")


def test_collections_leave_out_what_lives_as_long_as_the_process():
    try:
        spare_collections()
        assert gc.get_freeze_count() > 10_000
        assert len(gc.get_objects()) < 10_000
    finally:
        gc.unfreeze()
    assert gc.get_freeze_count() == 0


def test_load_counts_the_bodies_that_are_looked_at(tiny_folder):
    with running(make_llm(tiny_folder)) as server:
        with pool_held(server):
            thread, replies = in_background(complete, server)
            until(lambda: call(server, "GET", "/load").json()["requests_waiting"] == 1)
        thread.join(60)
        assert replies[0].status == 200


def test_a_refused_exchange_leaves_nothing_that_only_a_collection_would_find(tiny_server):
    complete(tiny_server, prompt=[])
    gc.collect()
    gc.disable()
    try:
        for fields in ({"prompt": []}, {"prompt": [1] * 1000}, {"model": "nobody"}, {"prompt": "a" * 100_000}):
            assert complete(tiny_server, **fields).status in (400, 404)
        tiny_server.wait_idle()
        until(lambda: not any(type(found) is Refusal for found in gc.get_objects()))
    finally:
        gc.enable()
