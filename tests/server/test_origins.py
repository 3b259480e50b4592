"""Browsers: host names that a server accepts, and protection against pages of other origins."""

import pytest

from harness.serving import call, make_llm, running
from kvloom.errors import InvalidInputError
from kvloom.server.settings import ServerConfig

PAGE = "https://chat.example.org"
JSON = {"Content-Type": "application/json"}
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


def refused(reply, code):
    assert (reply.status, reply.json()["error"]["code"]) == (403, code), reply.body
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "LOCALHOST.", "127.0.0.1."]
)
def test_a_keyless_server_on_loopback_answers_to_this_machines_names(tiny_server, host):
    assert call(tiny_server, "GET", "/v1/models", headers={"Host": host}).status == 200


@pytest.mark.parametrize("host", ["rebind.example.org", "127.0.0.1.example.org:8000", "localhost.example.org", "[::2]"])
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics", "/"])
def test_a_host_that_is_rebound_to_this_machine_reads_nothing(tiny_server, host, path):
    refused(call(tiny_server, "GET", path, headers={"Host": host}), "host_not_allowed")


def test_hosts_can_be_allowed_by_name_and_by_domain(tiny_folder):
    with running(make_llm(tiny_folder), allowed_hosts=("llm.example.org", "*.lan")) as server:
        statuses = [
            call(server, "GET", "/health", headers={"Host": host}).status
            for host in ("llm.example.org:80", "box.lan", "lan", "localhost", "x.llm.example.org")
        ]
    assert statuses == [200, 200, 403, 403, 403]


def test_a_server_with_a_key_is_asked_for_by_any_name(tiny_folder):
    with running(make_llm(tiny_folder), api_key=("k",)) as server:
        headers = {"Host": "llm.example.org", "Authorization": "Bearer k"}
        assert call(server, "GET", "/v1/models", headers=headers).status == 200


POSTS = ("/reset_prefix_cache", "/ping", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": PAGE},
        {"Origin": "null"},
        {"Origin": "http://localhost:9"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Origin": PAGE},
    ],
)
def test_a_page_of_another_origin_changes_nothing(tiny_server, path, headers):
    refused(call(tiny_server, "POST", path, raw=b"{}", headers={**JSON, **headers}), "origin_not_allowed")


def test_the_servers_own_pages_may_post(tiny_server):
    own = f"http://127.0.0.1:{tiny_server.port}"
    for headers in ({"Origin": own}, {"Origin": own, "Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}):
        assert call(tiny_server, "POST", "/reset_prefix_cache", headers=headers).status == 200


def test_no_page_of_another_origin_is_told_that_it_may_read(tiny_server):
    reply = call(tiny_server, "GET", "/v1/models", headers={"Origin": PAGE})
    assert "access-control-allow-origin" not in reply.headers
    refused(
        call(tiny_server, "OPTIONS", "/v1/chat/completions", headers={"Origin": PAGE, **PREFLIGHT}),
        "origin_not_allowed",
    )


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [("GET", "/health", {}), ("GET", "/metrics", {}), ("GET", "/no", {}), ("POST", "/ping", {"Origin": PAGE})],
)
def test_no_reply_can_be_embedded_in_a_page_which_would_learn_that_it_loaded(tiny_server, method, path, headers):
    reply = call(tiny_server, method, path, headers=headers)
    assert reply.headers["cross-origin-resource-policy"] == "same-origin"
    assert reply.headers["x-content-type-options"] == "nosniff"


@pytest.fixture(scope="module")
def open_to_a_page(tiny_folder):
    with running(make_llm(tiny_folder), api_key=("k",), allowed_origins=(PAGE,)) as server:
        yield server


def test_a_preflight_of_an_allowed_origin_is_answered_before_the_key(open_to_a_page):
    reply = call(open_to_a_page, "OPTIONS", "/v1/chat/completions", headers={"Origin": PAGE, **PREFLIGHT})
    assert reply.status == 204
    assert reply.headers["access-control-allow-origin"] == PAGE and reply.headers["vary"] == "Origin"
    assert reply.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "POST" in reply.headers["access-control-allow-methods"]
    refused(
        call(open_to_a_page, "OPTIONS", "/v1/models", headers={"Origin": "https://b.example", **PREFLIGHT}),
        "origin_not_allowed",
    )


def test_an_allowed_page_reads_answers_and_refusals(open_to_a_page):
    headers = {"Origin": PAGE, "Authorization": "Bearer k", "Sec-Fetch-Site": "cross-site"}
    good = call(open_to_a_page, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}, headers)
    bad = call(open_to_a_page, "POST", "/v1/completions", {"prompt": "a"}, {"Origin": PAGE})
    assert (good.status, bad.status) == (200, 401)
    for reply in (good, bad):
        assert reply.headers["access-control-allow-origin"] == PAGE
        assert "Kvloom-Warning" in reply.headers["access-control-expose-headers"]


def test_any_origin_is_allowed_by_a_star(tiny_folder):
    with running(make_llm(tiny_folder), allowed_origins=("*",)) as server:
        reply = call(server, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}, {"Origin": PAGE})
    assert reply.status == 200 and reply.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    "options",
    [
        {"allowed_origins": ("chat.example.org",)},
        {"allowed_origins": (PAGE + "/path",)},
        {"allowed_hosts": ("http://a",)},
    ],
)
def test_what_is_no_origin_and_no_host_is_refused_at_the_start(options):
    with pytest.raises(InvalidInputError):
        ServerConfig(**options)
