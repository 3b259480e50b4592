"""The server as a process: signals, pauses, addresses, and how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from harness.serving import call, complete, open_stream, until

ARGUMENTS = ["--port", "0", "--dtype", "float32", "--block-size", "4", "--kv-cache-memory-bytes", "8MiB"]


class Process:
    """A `kvloom serve` in a process of its own."""

    def __init__(self, folder, *arguments):
        command = [sys.executable, "-m", "kvloom", "serve", str(folder), *ARGUMENTS, *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines = []
        self.sockets = []
        while not self.lines or self.lines[-1].get("message") != "listening":
            line = self.process.stderr.readline()
            assert line, f"the server ended: {self.lines}"
            self.lines.append(json.loads(line))
        self.port = int(self.lines[-1]["addresses"][0].rpartition(":")[2])

    def stream(self, **fields):
        """Begin a completion on a socket that is closed with the test."""
        self.sockets.append(open_stream(self, **fields))
        return self.sockets[-1]

    def send(self, number):
        self.process.send_signal(number)

    def end(self):
        """Wait for the end and return (status, log lines)."""
        rest = self.process.communicate(timeout=60)[1]
        return self.process.returncode, self.lines + [json.loads(line) for line in rest.splitlines()]


@pytest.fixture
def start(tiny_folder):
    """Start servers that are ended with the test."""
    started = []

    def begin(*arguments):
        started.append(Process(tiny_folder, *arguments))
        return started[-1]

    yield begin
    for server in started:
        for sock in server.sockets:
            sock.close()
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


def read_stream(sock, received=b""):
    while b"[DONE]" not in received:
        chunk = sock.recv(65536)
        if not chunk:
            break
        received += chunk
    return received


def text_of(received):
    events = [json.loads(line[6:]) for line in received.split(b"\r\n") if line.startswith(b"data: {")]
    return "".join(event["choices"][0]["text"] for event in events if event.get("choices"))


def test_a_pause_of_the_whole_process_loses_nothing(start):
    server = start()
    expected = complete(server, max_tokens=240, ignore_eos=True).json()["choices"][0]["text"]
    sock = server.stream(max_tokens=240)
    first = sock.recv(4096)
    server.send(signal.SIGSTOP)
    waiting = server.stream(max_tokens=5, stream=False)  # arrives while nobody is awake
    time.sleep(1.5)
    server.send(signal.SIGCONT)
    assert text_of(read_stream(sock, first)) == expected
    assert waiting.recv(65536).startswith(b"HTTP/1.1 200")
    assert call(server, "GET", "/health").status == 200
    server.send(signal.SIGTERM)
    assert server.end()[0] == 0


def test_sigterm_lets_running_answers_finish(start):
    server = start("--shutdown-timeout", "60")
    expected = complete(server, max_tokens=240, ignore_eos=True).json()["choices"][0]["text"]
    sock = server.stream(max_tokens=240)
    received = sock.recv(4096)
    server.send(signal.SIGTERM)
    assert text_of(read_stream(sock, received)) == expected
    status, lines = server.end()
    assert status == 0 and lines[-1]["message"] == "stopped"


def test_what_does_not_finish_in_time_is_told_that_it_was_cancelled(start):
    server = start("--shutdown-timeout", "0")
    socks = [server.stream(max_tokens=200, n=4, logprobs=20) for _ in range(8)]
    received = [sock.recv(4096) for sock in socks]
    server.send(signal.SIGTERM)
    ends = [read_stream(sock, first) for sock, first in zip(socks, received, strict=True)]
    assert all(b'"code":"shutting_down"' in end for end in ends)
    status, lines = server.end()
    assert status == 0 and any("cancelling" in line["message"] for line in lines)


def test_a_second_signal_does_not_wait(start):
    server = start("--shutdown-timeout", "600")
    sock = server.stream(max_tokens=240, n=8)
    sock.recv(100)
    server.send(signal.SIGINT)
    until(lambda: call(server, "GET", "/health").status == 503)  # else both signals could arrive as one
    server.send(signal.SIGINT)
    assert server.end()[0] == 0


def test_a_taken_port_is_told_before_the_model_is_loaded(tiny_folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "kvloom", "serve", str(tiny_folder / "none"), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and "cannot listen on 127.0.0.1 port" in done.stderr.splitlines()[-1]


def test_listening_to_everyone_without_a_key_is_warned_about(start):
    warned = start("--host", "0.0.0.0")
    assert any("SECURITY" in line["message"] and line["level"] == "warning" for line in warned.lines)
    quiet = start("--host", "0.0.0.0", "--api-key", "k")
    assert not any("SECURITY" in line["message"] for line in quiet.lines)


def test_flags_reach_the_server(start):
    server = start("--served-model-name", "a", "--served-model-name", "b", "--root-path", "/llm", "--max-logprobs", "3")
    names = [entry["id"] for entry in call(server, "GET", "/v1/models").json()["data"]]
    assert names == ["a", "b"]
    assert complete(SimpleNamespace(port=server.port), logprobs=4).status == 400
    assert call(server, "GET", "/health").status == 200
