"""Admission: keys, queue, concurrency; clients that disconnect or do not read."""

import json
import threading
from contextlib import contextmanager

import pytest

from harness.serving import call, complete, converse, in_background, make_llm, open_stream, running, until


@contextmanager
def held(server):
    """Hold the engine inside its next step; yields an event that is set once it is there."""
    engine, entered, gate = server.service.engine, threading.Event(), threading.Event()
    original = engine.step

    def step():
        entered.set()
        gate.wait(60)
        return original()

    engine.step = step
    try:
        yield entered
    finally:
        engine.step = original
        gate.set()


def test_a_full_queue_refuses_at_once_while_the_engine_is_in_a_step(tiny_folder):
    with running(make_llm(tiny_folder, max_num_seqs=1), max_num_queued_reqs=2) as server:
        with held(server) as entered:
            threads = [in_background(complete, server)]
            assert entered.wait(60)
            threads.append(in_background(complete, server))
            until(lambda: server.service.num_live == 2)
            refused = complete(server)  # answered although the engine stands still in a step
            assert (refused.status, refused.json()["error"]["code"]) == (429, "queue_full")
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert converse(server).status == 429
            assert call(server, "GET", "/load").json()["requests_waiting"] == 2
            assert call(server, "GET", "/health").status == 200
        for thread, replies in threads:
            thread.join(60)
            assert replies[0].status == 200
        assert complete(server).status == 200


def test_a_server_that_ends_takes_nothing_new_and_says_so(tiny_folder):
    with running(make_llm(tiny_folder)) as server:
        server.service.draining = True
        for reply in (complete(server), converse(server), call(server, "GET", "/health")):
            assert (reply.status, reply.json()["error"]["code"]) == (503, "shutting_down")


def test_a_body_with_more_prompts_than_the_queue_holds_is_refused_whole(tiny_folder):
    with running(make_llm(tiny_folder), max_num_queued_reqs=2) as server:
        assert complete(server, prompt=["a", "b", "c"]).status == 429
        assert server.service.engine.num_arrived == 0
        assert complete(server, prompt=["a", "b"]).status == 200


def test_too_many_exchanges_at_once_are_refused_and_monitors_get_through(tiny_folder):
    with running(make_llm(tiny_folder), max_concurrent_requests=1) as server:
        with held(server) as entered:
            thread, replies = in_background(complete, server)
            assert entered.wait(60)
            refused = call(server, "GET", "/v1/models")
            assert (refused.status, refused.json()["error"]["code"]) == (503, "too_many_requests")
            assert call(server, "GET", "/health").status == 200
        thread.join(60)
        assert replies[0].status == 200


def test_a_body_may_not_ask_for_more_sequences_than_the_limit(tiny_folder):
    with running(make_llm(tiny_folder), max_sequences_per_request=4) as server:
        assert complete(server, prompt=["a", "b"], n=3).status == 400


KEYS = ("secret-one", "secret-two")


@pytest.fixture(scope="module")
def keyed(tiny_folder):
    with running(make_llm(tiny_folder), api_key=KEYS, isolate_by_key=True) as server:
        yield server


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer ", "Basic secret-one", "secret-one", "Bearer \xff"])
def test_without_a_right_key_nothing_is_answered(keyed, header):
    headers = {} if header is None else {"Authorization": header}
    for method, path in (("GET", "/v1/models"), ("POST", "/tokenize"), ("GET", "/server_info"), ("GET", "/nowhere")):
        reply = call(keyed, method, path, {} if method == "POST" else None, headers)
        assert (reply.status, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"


def test_health_and_figures_need_no_key(keyed):
    assert [call(keyed, "GET", path).status for path in ("/health", "/ping", "/version", "/metrics")] == [200] * 4


def test_no_key_is_shown_anywhere(keyed):
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    body = call(keyed, "GET", "/server_info", headers=headers)
    assert body.status == 200 and body.json()["server"]["api_key"] == 2
    assert not any(key.encode() in body.body for key in KEYS)


def test_keys_do_not_share_prefixes(keyed):
    def cached(key):
        fields = {"prompt": list(range(80)), "max_tokens": 1}
        reply = call(keyed, "POST", "/v1/completions", fields, {"Authorization": f"Bearer {key}"})
        return reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached(KEYS[0]), cached(KEYS[1]), cached(KEYS[0])] == [0, 0, 76]


def test_a_client_that_leaves_mid_stream_frees_its_blocks_before_the_next_step(tiny_folder):
    with running(make_llm(tiny_folder)) as server:
        sock = open_stream(server, max_tokens=250)
        received = b""
        while b"data:" not in received:  # head and first event may come apart
            part = sock.recv(65536)
            assert part, received
            received += part
        engine, after = server.service.engine, []
        original = engine.abort

        def abort(name):
            output = original(name)
            after.append((engine.num_steps, engine.cache.bytes_in_use))
            return output

        engine.abort = abort
        with held(server) as entered:
            assert entered.wait(60)
            steps = engine.num_steps
            sock.close()
            until(lambda: not server.service.num_live)
        until(lambda: after)
        assert after[0] == (steps + 1, 0)  # the step that was under way ends, and none begins before
        server.wait_idle()
        assert server.blocks_in_use() == 0


def test_a_client_that_leaves_before_its_answer_is_aborted(tiny_folder):
    with running(make_llm(tiny_folder, max_num_seqs=1)) as server:
        with held(server) as entered:
            sock = open_stream(server, max_tokens=200, stream=False)
            assert entered.wait(60)
            sock.close()
            until(lambda: not server.service.num_live)
        server.wait_idle()
        assert server.service.engine.answers.num_generated_tokens < 200
        assert server.blocks_in_use() == 0


def test_a_reader_that_does_not_read_delays_nobody_and_loses_nothing(tiny_folder):
    with running(make_llm(tiny_folder)) as server:
        fields = {"max_tokens": 200, "logprobs": 20, "n": 4, "return_token_ids": True}  # more than sockets hold
        slow = open_stream(server, **fields)
        slow.recv(1)
        until(lambda: not server.service.engine.requests)  # it ran to its end though nobody read
        assert complete(server).status == 200
        assert server.blocks_in_use() == 0
        received = b""
        while b"[DONE]" not in received:
            received += slow.recv(1 << 20)
        slow.close()
        count = 0
        for line in received.split(b"\r\n"):
            if line.startswith(b"data: {"):
                count += sum(len(choice["token_ids"]) for choice in json.loads(line[6:])["choices"])
        assert count == 800


def test_a_reader_that_never_reads_is_cut_off(tiny_folder):
    with running(make_llm(tiny_folder, max_model_len=None), client_timeout=1) as server:
        sock = open_stream(server, prompt=["a"] * 64, max_tokens=240, logprobs=20, return_token_ids=True)
        until(lambda: server.service.num_live)
        until(lambda: not server.service.num_open)
        sock.close()
        server.wait_idle()
        assert server.blocks_in_use() == 0
