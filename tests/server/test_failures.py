"""When a step fails its requests fail, and nothing else; when the engine dies the server says so."""

import pytest

from harness.serving import call, complete, make_llm, open_stream, running, until

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


class FailingModel(RuntimeError):
    """What the tests make a step raise."""


def fail_next(server, times):
    """Make the next `times` runs of the model raise."""
    runner = server.service.engine.runner
    original, left = runner.forward, [times]

    def run(*arguments, **options):
        if left[0]:
            left[0] -= 1
            raise FailingModel("injected")
        return original(*arguments, **options)

    runner.forward = run


def test_a_failing_step_fails_its_request_and_the_server_goes_on(tiny_folder):
    with running(make_llm(tiny_folder)) as server:
        expected = complete(server).json()["choices"]
        fail_next(server, 1)
        reply = complete(server)
        assert (reply.status, reply.json()["error"]["code"]) == (500, "step_failed")
        assert "FailingModel" in reply.json()["error"]["message"] and "injected" not in reply.body.decode()
        assert server.blocks_in_use() == 0
        assert complete(server).json()["choices"] == expected
        assert call(server, "GET", "/health").status == 200


def test_a_request_without_finite_logits_fails_alone_and_is_told_why(tiny_folder):
    with running(make_llm(tiny_folder)) as server:
        expected = complete(server).json()["choices"]
        runner = server.service.engine.runner
        original = runner.forward

        def spoiled(*arguments, **options):
            runner.forward = original
            found = original(*arguments, **options)
            found.output.greedy[:] = [-1] * len(found.output.greedy)
            return found

        runner.forward = spoiled
        reply = complete(server)
        assert (reply.status, reply.json()["error"]["code"]) == (500, "request_failed")
        assert "not a finite number" in reply.json()["error"]["message"]
        assert server.blocks_in_use() == 0
        assert complete(server).json()["choices"] == expected


MESSAGES = [{"role": "user", "content": "hello"}]
STREAMS = [
    ("/v1/completions", {"max_tokens": 200}, b"data: [DONE]"),
    ("/v1/responses", {"field": "input", "max_output_tokens": 200}, b"event: response.failed"),
    ("/v1/messages", {"field": "system", "messages": MESSAGES, "max_tokens": 200}, b"event: error"),
]
"""Route, fields, and what the last event of a stream that failed has in it."""


def test_a_stream_that_fails_in_the_middle_ends_with_an_error_event_of_its_api(tiny_folder):
    with running(make_llm(tiny_folder)) as server:
        for path, fields, end in STREAMS:
            sock = open_stream(server, path, **fields)
            received = sock.recv(65536)
            fail_next(server, 1)
            while not received.endswith(b"\r\n0\r\n\r\n"):
                received += sock.recv(65536)
            sock.close()
            assert b'"code":"step_failed"' in received and end in received.split(b"\n\n")[-2], path
            server.wait_idle()
            assert server.blocks_in_use() == 0


def test_many_failures_in_a_row_do_not_end_an_engine_that_still_answers(tiny_folder):
    with running(make_llm(tiny_folder)) as server:
        for _ in range(4):
            fail_next(server, 1)
            assert complete(server).status == 500
        fail_next(server, 2)
        assert [complete(server).status for _ in range(3)] == [500, 500, 200]
        assert server.service.thread.alive


def test_an_engine_that_fails_its_probe_is_dead_and_health_says_so(tiny_folder):
    with running(make_llm(tiny_folder)) as server:
        fail_next(server, 1000)
        statuses = [complete(server).status for _ in range(4)]
        assert statuses == [500, 500, 500, 503]
        health = call(server, "GET", "/health")
        assert (health.status, health.json()["error"]["code"]) == (503, "engine_dead")
        assert call(server, "GET", "/ping").status == 503
        assert call(server, "POST", "/reset_prefix_cache").status == 503
        assert call(server, "GET", "/metrics").status == 200


def test_books_that_no_longer_agree_end_the_engine_and_all_its_requests(tiny_folder):
    with running(make_llm(tiny_folder)) as server:
        stream = open_stream(server, max_tokens=250)
        received = stream.recv(65536)
        server.service.engine.cache.check_invariants = lambda: (_ for _ in ()).throw(AssertionError("books"))
        fail_next(server, 1)
        while b"[DONE]" not in received:
            received += stream.recv(65536)
        stream.close()
        until(lambda: not server.service.thread.alive)
        assert complete(server).status == 503
