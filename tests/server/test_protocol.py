"""The corners of HTTP that proxies, load balancers, browsers and other people's clients reach."""

import gzip
import http.client
import json
import re
import socket
import ssl
import subprocess
import threading

import pytest

from harness.serving import Reply, call, complete, converse, make_llm, make_model, running, until
from kvloom.errors import InvalidInputError
from kvloom.server.listening import bind_unix, listen
from kvloom.server.serve import build_server
from kvloom.server.settings import ServerConfig


def raw_status(server, target, host="localhost"):
    """Send a GET with a target as it is and return the status."""
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return int(sock.makefile("rb").readline().split()[1])


def test_the_root_says_what_this_is_and_where_to_go_on(tiny_server):
    body = call(tiny_server, "GET", "/").json()
    assert (body["name"], body["model"]) == ("kvloom", "tiny") and body["version"]
    assert all(call(tiny_server, "GET", link).status == 200 for link in body["links"].values())


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/version", "/metrics"])
def test_a_head_request_is_answered_like_a_get_without_its_body(tiny_server, path):
    reply = call(tiny_server, "HEAD", path)
    assert reply.status == 200 and reply.body == b""


@pytest.fixture(scope="module")
def keyed(tiny_folder):
    with running(make_llm(tiny_folder), api_key=("k",)) as server:
        yield server


def test_the_root_of_a_server_with_keys_does_not_name_the_model(keyed):
    reply = call(keyed, "GET", "/")
    assert reply.status == 200 and "tiny" not in reply.body.decode()


@pytest.mark.parametrize("root", ["/llm", "llm/"])
def test_a_root_path_is_found_whether_the_proxy_takes_it_off_or_not(tiny_folder, root):
    with running(make_llm(tiny_folder), root_path=root) as server:
        paths = ("/v1/models", "/llm/v1/models", "/llm", "/llm/health", "/llmv1/models", "/llm/llm/health")
        assert [call(server, "GET", path).status for path in paths] == [200, 200, 200, 200, 404, 404]
        assert call(server, "POST", "/llm/v1/completions", {"prompt": "a", "max_tokens": 1}).status == 200
        assert call(server, "GET", "/llm").json()["links"]["models"] == "/llm/v1/models"


def test_a_target_in_absolute_form_is_a_path_and_names_the_host(tiny_server):
    here = f"http://127.0.0.1:{tiny_server.port}"
    assert raw_status(tiny_server, f"{here}/v1/models") == 200
    assert raw_status(tiny_server, here) == 200
    assert raw_status(tiny_server, f"{here}/health", host="rebind.example.org") == 200  # the target counts
    assert raw_status(tiny_server, "http://rebind.example.org/health") == 403
    assert raw_status(tiny_server, "http://[half/health") == 404


def test_a_compressed_body_is_refused_as_what_it_is(tiny_server):
    raw = gzip.compress(json.dumps({"prompt": "a"}).encode())
    reply = call(tiny_server, "POST", "/v1/completions", raw=raw, headers={"Content-Encoding": "gzip"})
    assert reply.status == 415 and "gzip" in reply.json()["error"]["message"]
    plain = call(
        tiny_server, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}, {"Content-Encoding": "identity"}
    )
    assert plain.status == 200


def test_ids_of_answers_are_unique_although_a_request_id_repeats(tiny_server):
    headers = {"X-Request-Id": "again"}
    bodies = [
        call(tiny_server, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}, headers).json() for _ in range(3)
    ]
    bodies += [converse(tiny_server, request_id="again").json() for _ in range(2)]
    assert len({body["id"] for body in bodies}) == 5 and all("again" in body["id"] for body in bodies)


def test_minus_one_is_no_limit_of_tokens(tiny_server):
    fields = {"max_tokens": -1, "ignore_eos": True}
    for reply in (complete(tiny_server, **fields), converse(tiny_server, **fields)):
        usage = reply.json()["usage"]
        assert usage["total_tokens"] == 256
    assert converse(tiny_server, max_completion_tokens=-1, ignore_eos=True).json()["usage"]["total_tokens"] == 256
    assert complete(tiny_server, max_tokens=-2).status == 400


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"Authorization": "k"}, "without Bearer"),
        ({"Authorization": "Basic k"}, "without Bearer"),
        ({"Authorization": "Bearer"}, "no API key behind Bearer"),
        ({"Authorization": "Bearer x"}, "a wrong API key"),
        ({"x-api-key": "x"}, "a wrong API key"),
        ({}, "no API key"),
    ],
)
def test_a_key_that_is_sent_the_wrong_way_is_told_how(keyed, headers, said):
    reply = call(keyed, "GET", "/v1/models", headers=headers)
    assert reply.status == 401 and said in reply.json()["error"]["message"]


def test_a_key_may_come_in_either_header(keyed):
    for headers in ({"x-api-key": "k"}, {"Authorization": "Bearer k"}, {"Authorization": "bearer k"}):
        assert call(keyed, "GET", "/v1/models", headers=headers).status == 200


def test_too_long_is_said_in_the_words_that_clients_look_for(tiny_server):
    for reply in (complete(tiny_server, prompt=[1] * 300), converse(tiny_server, "x" * 300)):
        error = reply.json()["error"]
        assert re.match(
            r"This model's maximum context length is 256 tokens\. However, your prompt has 3\d\d tokens",
            error["message"],
        )
        assert error["code"] == "context_length_exceeded" and error["code"] in error["message"]


def test_a_developer_is_the_system_where_the_template_knows_none(tiny_server):
    def tokens(role):
        messages = [{"role": role, "content": "be brief"}, {"role": "user", "content": "hi"}]
        return call(tiny_server, "POST", "/tokenize", {"messages": messages}).json()["tokens"]

    assert tokens("developer") == tokens("system") != tokens("user")


def test_a_developer_stays_one_where_the_template_knows_it(tmp_path):
    template = "{% for m in messages %}{% if m.role == 'developer' %}D{% else %}U{% endif %}{{ m.content }}{% endfor %}"
    with running(make_llm(make_model(tmp_path, template=template))) as server:
        body = {"messages": [{"role": "developer", "content": "x"}]}
        assert call(server, "POST", "/tokenize", body).json()["tokens"] == [ord("D") - 33, ord("x") - 33]


def test_an_unknown_role_is_refused_with_those_that_are_known(tiny_server):
    reply = converse(tiny_server, messages=[{"role": "usr", "content": "x"}])
    error = reply.json()["error"]
    assert (reply.status, error["param"], error["code"]) == (400, "messages", "unknown_role")
    assert "'usr'" in error["message"] and "assistant" in error["message"]


def test_an_effort_that_the_model_cannot_make_is_warned_about(tiny_server):
    reply = converse(tiny_server, reasoning_effort="high")
    assert reply.status == 200 and "reasoning_effort" in reply.headers["kvloom-warning"]


def test_the_tokenizer_is_described_for_remote_harnesses(tiny_server):
    body = call(tiny_server, "GET", "/tokenizer_info").json()
    assert (body["eos_token"], body["eos_token_id"], body["bos_token"]) == ("<end>", 256, None)
    assert (body["model_max_length"], body["vocab_size"]) == (256, 257) and "messages" in body["chat_template"]


def test_figures_of_the_process_are_among_the_metrics(tiny_server):
    text = call(tiny_server, "GET", "/metrics").body.decode()
    for name in ("process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"):
        assert re.search(rf"^{name} [0-9.e+]+$", text, re.MULTILINE)


def test_connections_are_kept_longer_than_clients_keep_theirs(tiny_folder):
    assert ServerConfig().timeout_keep_alive == 75
    llm = make_llm(tiny_folder)
    assert build_server(llm, ServerConfig()).config.timeout_keep_alive == 75
    with running(llm, timeout_keep_alive=1) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("GET", "/health")
        connection.getresponse().read()
        assert connection.sock.recv(1) == b""  # closed by the server, after a second
        connection.close()


class OnSocket(http.client.HTTPConnection):
    """A connection over a socket that is connected already."""

    def __init__(self, sock):
        super().__init__("localhost")
        self.sock = sock


def get(sock, path):
    connection = OnSocket(sock)
    connection.request("GET", path, headers={"Connection": "close"})
    response = connection.getresponse()
    return Reply(response.status, dict(response.getheaders()), response.read())


@pytest.fixture
def served(tiny_folder):
    """Run servers on sockets of their own, ended with the test."""
    started = []

    def begin(config):
        sock = listen(config)
        server = build_server(make_llm(tiny_folder), config)
        thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
        thread.start()
        started.append((server, thread))
        until(lambda: server.started)
        return sock

    yield begin
    for server, thread in started:
        server.should_exit = True
        thread.join(60)


def test_a_server_answers_on_a_unix_socket_that_a_dead_one_left(served, tmp_path):
    path = str(tmp_path / "s")
    bind_unix(path).close()  # stays in the folder, and nobody listens
    served(ServerConfig(uds=path, disable_log_stats=True))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        assert get(sock, "/health").status == 200
    with pytest.raises(InvalidInputError, match="cannot listen on the socket"):
        bind_unix(path)  # somebody listens
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidInputError, match="--uds"):
        bind_unix(str(tmp_path / "file"))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Paths of a self-signed certificate for localhost and of its key."""
    folder = tmp_path_factory.mktemp("tls")
    names = [str(folder / "cert.pem"), str(folder / "key.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-out", names[0], "-keyout", names[1]]
    subprocess.run(command, check=True, capture_output=True)
    return names


def test_a_server_speaks_tls_with_its_certificate(served, certificate):
    config = ServerConfig(port=0, ssl_certfile=certificate[0], ssl_keyfile=certificate[1], disable_log_stats=True)
    port = served(config).getsockname()[1]
    context = ssl.create_default_context(cafile=certificate[0])
    with context.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="localhost") as sock:
        assert get(sock, "/health").status == 200


def test_a_certificate_that_cannot_be_used_is_told_before_anything_else(certificate, tmp_path):
    for certfile, keyfile in ((certificate[1], None), (str(tmp_path / "none"), None), (certificate[0], certificate[0])):
        with pytest.raises(InvalidInputError, match="--ssl-certfile"):
            listen(ServerConfig(port=0, ssl_certfile=certfile, ssl_keyfile=keyfile))
    with pytest.raises(InvalidInputError, match="give ssl_certfile"):
        ServerConfig(ssl_keyfile=certificate[1])
