"""/metrics: what the Prometheus client library reads, under both names, is what was done."""

import io
import json
import logging
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from harness.serving import call, complete, converse, make_llm, open_stream, running
from kvloom.server.enginestats import read_stats
from kvloom.server.logs import JSONFormatter, configure_logs, wrapped_stderr
from kvloom.server.metrics import TWINS, ServerMetrics

LABELS = {"model_name": "tiny", "engine": "0"}


def scrape(server):
    """Return {(sample name, labels beside the usual ones): value}; every sample must carry the usual ones."""
    reply = call(server, "GET", "/metrics")
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(reply.body.decode()):
        for sample in family.samples:
            if sample.name.startswith(("kvloom:", "vllm:")):
                assert {**sample.labels, **LABELS} == sample.labels
                rest = tuple(sorted((k, v) for k, v in sample.labels.items() if k not in LABELS))
                assert (sample.name, rest) not in found
                found[sample.name, rest] = sample.value
    return found


@pytest.fixture(scope="module")
def after_a_run(tiny_folder):
    """The figures after a run whose counts are known: 5 prompts of 40, 40, 8, 8 and 23 tokens."""
    with running(make_llm(tiny_folder)) as server:
        prompt = list(range(40))
        for _ in range(2):
            assert complete(server, prompt=prompt, max_tokens=10, ignore_eos=True).status == 200  # 10 tokens, length
        reply = complete(server, prompt=list(range(50, 58)), n=2, max_tokens=5, ignore_eos=True)  # 10 tokens, length
        text = reply.json()["choices"][0]["text"]
        stop = complete(server, prompt=list(range(50, 58)), max_tokens=5, ignore_eos=True, stop=text[0])
        assert stop.json()["choices"][0]["finish_reason"] == "stop"  # 1 token
        assert converse(server, ignore_eos=True).json()["usage"]["prompt_tokens"] == 23  # 8 tokens
        assert complete(server, temperature=-1).status == 400
        sock = open_stream(server, prompt=list(range(80, 88)), max_tokens=200)
        sock.recv(1000)
        sock.close()
        server.wait_idle()
        yield scrape(server), server.service.engine.answers.num_generated_tokens


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("prompt_tokens_total", (), 40 + 40 + 8 + 8 + 23 + 8),
        ("prefix_cache_queries_total", (), 40 + 40 + 8 + 8 + 23 + 8),
        ("prefix_cache_hits_total", (), 36 + 4),
        ("prompt_tokens_cached_total", (), 36 + 4),
        ("request_success_total", (("finished_reason", "length"),), 4),
        ("request_success_total", (("finished_reason", "stop"),), 1),
        ("request_success_total", (("finished_reason", "abort"),), 1),
        ("num_preemptions_total", (), 0),
        ("num_requests_running", (), 0),
        ("num_requests_waiting", (), 0),
        ("kv_cache_usage_perc", (), 0),
        ("time_to_first_token_seconds_count", (), 6),
        ("e2e_request_latency_seconds_count", (), 5),
        ("request_queue_time_seconds_count", (), 5),
        ("request_prefill_time_seconds_count", (), 5),
        ("request_decode_time_seconds_count", (), 5),
        ("request_time_per_output_token_seconds_count", (), 4),
        ("request_prompt_tokens_sum", (), 40 + 40 + 8 + 8 + 23),
        ("request_prompt_tokens_bucket", (("le", "20.0"),), 2),
        ("request_generation_tokens_sum", (), 10 + 10 + 10 + 1 + 8),
        ("request_generation_tokens_count", (), 5),
    ],
)
@pytest.mark.parametrize("prefix", ["kvloom:", "vllm:"])
def test_figures_are_those_of_the_run(after_a_run, prefix, name, labels, value):
    assert after_a_run[0][prefix + name, labels] == value


def test_generated_tokens_are_counted_with_the_aborted_ones(after_a_run):
    found, generated = after_a_run
    assert found["vllm:generation_tokens_total", ()] == generated > 39


def test_every_step_put_its_tokens_through_the_model(after_a_run):
    found, generated = after_a_run
    sampled_first = 6 + 1  # first tokens come out of the prompt's own step; a second answer forks there
    computed = 127 - 40
    assert found["vllm:iteration_tokens_total_sum", ()] == computed + generated - sampled_first


def test_times_are_in_order(after_a_run):
    found = after_a_run[0]
    parts = sum(found[f"vllm:request_{part}_time_seconds_sum", ()] for part in ("queue", "prefill", "decode"))
    assert parts == pytest.approx(found["vllm:e2e_request_latency_seconds_sum", ()], rel=1e-6)


def test_every_twin_has_the_value_of_its_own(after_a_run):
    found = after_a_run[0]
    own = {name.removeprefix("kvloom:"): value for (name, _), value in found.items() if name.startswith("kvloom:")}
    twins = {name.removeprefix("vllm:"): value for (name, _), value in found.items() if name.startswith("vllm:")}
    assert {name: own[name] for name in twins} == twins
    assert all(any(name.startswith(twin) for name in twins) for twin in TWINS)


def test_the_caches_options_are_labels(after_a_run):
    (labels,) = [labels for name, labels in after_a_run[0] if name == "vllm:cache_config_info"]
    assert dict(labels)["block_size"] == "4" and dict(labels)["cache_dtype"] == "fp32"


def test_what_policies_did_is_counted_in_bytes_tokens_and_spread(tiny_folder):
    with running(make_llm(tiny_folder, enable_prefix_caching=False)) as server:  # the index would keep blocks
        fields = {"prompt": [3, 5, 7, 11] * 25, "max_tokens": 4, "ignore_eos": True, "kv_policy": "tova(budget=16)"}
        kv = complete(server, **fields).json()["usage"]["kv"]
        server.wait_idle()
        found = scrape(server)
        lanes = server.service.engine.cache.spec.num_lanes
        per_token = server.service.engine.cache.spec.bytes_per_token // lanes
    assert found["kvloom:evicted_tokens_total", (("policy", kv["method"]),)] == kv["evicted_tokens"] > 0
    assert found["kvloom:kv_returned_bytes_total", ()] >= (100 - 16 - 4) // 4 * 4 * lanes * per_token
    # the prompt's step and three more, each over what a lane then holds: 100, then 16 and the new one
    assert found["kvloom:kv_read_bytes_total", ()] == (100 + 3 * 17) * lanes * per_token
    assert found["kvloom:request_lane_spread_tokens_sum", ()] == kv["longest_lane"] - kv["shortest_lane"]


def test_bytes_of_encoded_blocks_are_told_by_their_store(tiny_folder):
    with running(make_llm(tiny_folder, kv_cache_dtype="int8")) as server:
        sock = open_stream(server, prompt=[3, 5, 7, 11] * 20, max_tokens=150)
        sock.recv(1000)
        stats = server.service.thread.call(read_stats).result(60)
        sock.close()
        server.wait_idle()
        labels = [dict(labels) for name, labels in scrape(server) if name == "vllm:cache_config_info"]
        spec = server.service.engine.cache.spec
    assert labels[0]["cache_dtype"] == "int8" and list(stats.kv_bytes_by_policy) == ["int8"]
    assert set(stats.kv_bytes_by_store) == {"fp32", "int8"}
    assert sum(stats.kv_bytes_by_store.values()) == stats.kv_bytes_in_use
    column = sum(spec.lane_block_bytes(lane, "int8") for lane in range(spec.num_lanes))
    blocks, rest = divmod(stats.kv_bytes_by_store["int8"], column)
    assert blocks >= 80 // spec.block_size and rest == 0


def test_bytes_and_bits_of_running_sequences_are_told_by_policy(tiny_folder):
    with running(make_llm(tiny_folder)) as server:
        sock = open_stream(server, prompt=[3, 5, 7, 11] * 20, max_tokens=150, kv_policy="tova(budget=16)")
        sock.recv(1000)
        stats = server.service.thread.call(read_stats).result(60)
        sock.close()
        server.wait_idle()
    [(policy, held)] = stats.kv_bytes_by_policy.items()
    assert policy == "tova(budget=16)" and held == stats.kv_bytes_in_use
    assert 0 < stats.kv_bits_per_token < 8 * server.service.engine.cache.spec.bytes_per_token


def test_policies_beyond_a_number_share_a_label():
    metrics = ServerMetrics("tiny", {})
    labels = {metrics._policy_label(f"streaming(budget={n})") for n in range(1000)}
    assert len(labels) == 65 and "other" in labels
    assert metrics._policy_label("streaming(budget=3)") == "streaming(budget=3)"


def test_refusals_are_counted_by_code(after_a_run):
    assert after_a_run[0]["kvloom:requests_refused_total", (("code", "invalid_request_error"),)] == 1


def test_a_log_line_is_json_with_the_request_id_and_no_prompt(tiny_server):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JSONFormatter())
    logger = logging.getLogger("kvloom.access")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        reply = call(tiny_server, "POST", "/v1/completions", {"prompt": "secret words"}, {"X-Request-Id": "abc-1"})
        call(tiny_server, "GET", "/health")
        call(tiny_server, "GET", "/nowhere")
        tiny_server.wait_idle()
    finally:
        logger.removeHandler(handler)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert reply.headers["x-request-id"] == "abc-1" and reply.json()["id"].startswith("cmpl-abc-1-")
    assert [line["path"] for line in lines] == ["/v1/completions", "/nowhere"]
    first = lines[0]
    assert (first["request_id"], first["status"], first["prompt_tokens"]) == ("abc-1", 200, 12)
    assert "secret" not in stream.getvalue() and lines[1]["error"] == "no_such_route"


def test_an_id_that_could_forge_a_log_line_is_replaced(tiny_server):
    reply = call(tiny_server, "GET", "/version", headers={"X-Request-Id": 'x" "status'})
    assert reply.headers["x-request-id"] != 'x" "status' and len(reply.headers["x-request-id"]) == 24


def test_lines_of_libraries_on_standard_error_become_log_lines(capfd):
    import warnings

    names = ("kvloom", "uvicorn", None)
    before = [(logging.getLogger(n), logging.getLogger(n).handlers, logging.getLogger(n).level) for n in names]
    stream = io.StringIO()
    try:
        configure_logs(stream)
        with wrapped_stderr():
            print("half a ", end="", file=sys.stderr)
            print("line\n\rbar 10%\rbar 20%", file=sys.stderr)
            logging.getLogger("some.library").warning("from %s", "logging")
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.warn("from warnings", UserWarning, stacklevel=1)
            print("no end", end="", file=sys.stderr)
    finally:
        logging.captureWarnings(False)
        for logger, handlers, level in before:
            logger.handlers, logger.level, logger.propagate = handlers, level, True
    said = [json.loads(line)["message"] for line in stream.getvalue().splitlines()]
    assert said[:4] == ["half a line", "bar 10%", "bar 20%", "from logging"]
    assert "from warnings" in said[4] and said[5:] == ["no end"]
    assert capfd.readouterr().err == ""
