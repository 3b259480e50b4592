"""The load generator: plans, percentiles and goals by hand, and a run against a server whose answers are known."""

import asyncio
import itertools
import json
import math

import pytest

from harness.serving import call, make_llm, running
from kvloom.bench.connection import Endpoint, ServerAnswerError
from kvloom.bench.figures import meets, percentile, read_goals, summary
from kvloom.bench.load import Load, Outcome
from kvloom.bench.prompts import LoadPrompt, custom_prompts, random_prompts
from kvloom.cli.main import run
from kvloom.errors import InvalidInputError


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from harness.serving import make_model

    with running(make_llm(make_model(tmp_path_factory.mktemp("tiny"))), max_num_queued_reqs=100) as found:
        yield found


@pytest.fixture
def bench(server, capsys):
    """Run `kvloom bench serve` against the server and return (exit code, output)."""

    def go(*arguments):
        code = run(["bench", "serve", "--base-url", server.url, *arguments])
        return code, capsys.readouterr()

    return go


def test_percentiles_are_interpolated_between_ranks():
    assert [percentile([4.0, 1.0, 3.0, 2.0], p) for p in (0, 50, 90, 100)] == pytest.approx([1.0, 2.5, 3.7, 4.0])


def test_figures_of_known_outcomes():
    first = Outcome(0.0, ttft=0.1, end=0.5, gaps=[0.2, 0.2], prompt_tokens=10, output_tokens=5)
    second = Outcome(0.0, ttft=0.3, end=0.3, prompt_tokens=20, output_tokens=1)
    failed = Outcome(0.0, error="429")
    goals = {"ttft": 200.0, "tpot": 100.0}
    found = summary([first, second, failed], 2.0, metrics=["ttft", "tpot"], percentiles=[99], goals=goals)
    assert (found["completed"], found["failed"], found["request_throughput"]) == (2, 1, 1.0)
    assert (found["output_throughput"], found["total_token_throughput"]) == (3.0, 18.0)
    assert found["mean_tpot_ms"] == pytest.approx(100.0) and found["median_ttft_ms"] == pytest.approx(200.0)
    assert found["request_goodput"] == 0.5  # the second was late, the third had no answer
    assert [meets(o, {"e2el": 400.0}) for o in (first, second, failed)] == [False, True, False]


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:x", "itl:5", "tpot:-1"])
def test_a_goal_that_means_nothing_is_refused(text):
    with pytest.raises(InvalidInputError):
        read_goals([text])


def test_arrivals_have_the_rate_asked_for_and_are_the_same_again():
    prompts = [LoadPrompt("x", 1)] * 4000
    load = Load(Endpoint("http://127.0.0.1:1"), "/", None, prompts, rate=50.0, seed=1)
    times = load.arrivals()
    assert times == load.arrivals() == sorted(times)
    assert times[-1] / 4000 == pytest.approx(1 / 50, rel=0.05)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert math.fsum(g * g for g in gaps) / 3999 == pytest.approx(2 / 50**2, rel=0.1)  # second moment of Poisson's gaps


def test_random_prompts_have_the_lengths_and_the_prefix_asked_for():
    found = random_prompts(50, input_len=20, output_len=10, range_ratio=0.5, prefix_len=4, vocab_size=7, seed=3)
    assert len({tuple(p.prompt[:4]) for p in found}) == 1
    assert {len(p.prompt) - 4 for p in found} <= set(range(10, 31)) and len({len(p.prompt) for p in found}) > 5
    assert all(0 <= token < 7 for p in found for token in p.prompt)


def test_custom_prompts_name_the_line_at_fault(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b", "max_tokens": 3}\n')
    found = custom_prompts(path, 5, output_len=9, seed=0)
    assert sorted((p.prompt, p.max_tokens) for p in found[:2]) == [("a", 9), ("b", 3)] and len(found) == 5
    path.write_text('{"prompt": "a"}\n{"text": 1}\n')
    with pytest.raises(InvalidInputError, match=r":2 is not JSON like"):
        custom_prompts(path, 1, output_len=1, seed=0)


LOADS = (["--request-rate", "200"], ["--max-concurrency", "3"], [])


@pytest.mark.parametrize("how", LOADS, ids=["open", "closed", "at once"])
def test_a_run_counts_what_the_server_counts(bench, server, how, tmp_path):
    before = server.service.engine.answers.num_generated_tokens
    name = ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "r.json"]
    size = ["--num-prompts", "12", "--random-input-len", "9", "--random-output-len", "5", "--num-warmups", "0"]
    code, output = bench("--json", "--ignore-eos", "--goodput", "ttft:60000", *size, *how, *name)
    report = json.loads(output.out)
    assert code == 0 and report == json.loads((tmp_path / "r.json").read_text())
    assert (report["completed"], report["failed"], report["errors"]) == (12, 0, [])
    assert (report["total_input_tokens"], report["total_output_tokens"]) == (108, 60)
    assert server.service.engine.answers.num_generated_tokens - before == 60
    assert report["request_goodput"] == pytest.approx(report["request_throughput"])
    assert report["mean_kv_peak_bytes"] > 0
    assert report["p50_ttft_ms"] <= report["p99_ttft_ms"] <= report["p99_e2el_ms"]


def test_conversations_are_taken_from_a_file(bench, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "hello", "max_tokens": 4}\n')
    path = ["--dataset-name", "custom", "--dataset-path", str(tmp_path / "p.jsonl")]
    code, output = bench("--endpoint", "/v1/chat/completions", "--num-prompts", "3", *path)
    assert code == 0 and "time to first token" in output.out and "completed" in output.out


def test_errors_are_counted_and_shown(bench):
    code, output = bench("--num-prompts", "2", "--random-input-len", "999", "--num-warmups", "0")
    assert code == 2 and "context_length_exceeded" in output.err
    code, output = bench("--num-prompts", "2", "--model", "gpt")
    assert code == 2 and "warm-up" in output.err and "gpt" in output.err


def test_nobody_there_is_said_so(capsys):
    assert run(["bench", "serve", "--base-url", "http://127.0.0.1:1"]) == 2
    assert "no server answers" in capsys.readouterr().err


def test_an_error_status_carries_the_servers_words(server):
    async def ask():
        endpoint = Endpoint(server.url)
        with pytest.raises(ServerAnswerError, match="no_such_route"):
            await endpoint.get("/nowhere")
        assert (await endpoint.get("/version"))["version"]
        endpoint.close()

    asyncio.run(ask())
    assert call(server, "GET", "/health").status == 200
