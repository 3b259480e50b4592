"""`kvloom bench latency` and `throughput`: figures of known runs by hand, and both commands on a tiny model."""

import json

import pytest

from kvloom.bench.direct import Run, latency_figures, run_at_once, throughput_figures
from kvloom.bench.prompts import LoadPrompt
from kvloom.cli.main import run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from harness.serving import make_model

    return str(make_model(tmp_path_factory.mktemp("tiny")))


class StandInEngine:
    """Gives every request one token a step until it has all of them."""

    def __init__(self):
        self.left, self.steps = [], 0

    @property
    def has_work(self):
        return bool(self.left)

    def add(self, prompt_token_ids, params):
        self.left.append([params])

    def step(self):
        self.steps += 1
        now = list(self.left)
        for request in now:
            request[0] -= 1
        self.left = [request for request in now if request[0]]
        return now


def test_every_request_has_its_first_token_noted_and_all_run_to_their_end():
    engine = StandInEngine()
    done = run_at_once(engine, [LoadPrompt([1, 2], 3), LoadPrompt([1], 5)], lambda tokens: tokens)
    assert (engine.steps, len(done.first), done.prompt_tokens, done.output_tokens) == (5, 2, 3, 8)
    assert max(done.first) <= done.seconds


def test_latency_is_of_the_slowest_first_token_and_percentiles_are_interpolated():
    found = latency_figures([Run(1.0, [0.1, 0.3], 8, 8), Run(3.0, [0.5, 0.1], 8, 8)])
    assert (found["avg_latency"], found["avg_time_to_first_token"], found["latencies"]) == (2.0, 0.4, [1.0, 3.0])
    assert found["percentiles"]["50"] == 2.0 and found["percentiles"]["75"] == 2.5


def test_throughput_counts_prompts_and_answers():
    found = throughput_figures(Run(2.0, [0.1], 30, 10), 4)
    assert (found["requests_per_second"], found["tokens_per_second"]) == (2.0, 20.0)
    assert found["output_tokens_per_second"] == 5.0


def test_latency_of_a_model_is_printed_and_saved(model, tmp_path, capsys):
    saved = tmp_path / "latency.json"
    arguments = ["--input-len", "6", "--output-len", "4", "--batch-size", "2", "--num-iters", "2"]
    assert run(["bench", "latency", model, *arguments, "--output-json", str(saved)]) == 0
    assert capsys.readouterr().out.startswith("Avg latency: ")
    report = json.loads(saved.read_text())
    assert len(report["latencies"]) == 2 and report["batch_size"] == 2


def test_throughput_of_a_model_counts_every_token(model, capsys):
    arguments = ["--input-len", "6", "--output-len", "4", "--num-prompts", "3", "--json"]
    assert run(["bench", "throughput", model, *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_requests"], report["total_num_tokens"], report["total_output_tokens"]) == (3, 30, 12)


def test_a_result_that_cannot_be_saved_says_so(model, tmp_path, capsys):
    arguments = ["--input-len", "6", "--output-len", "2", "--num-prompts", "1"]
    assert run(["bench", "throughput", model, *arguments, "--output-json", str(tmp_path / "no" / "x.json")]) == 2
    assert "cannot save the result" in capsys.readouterr().err
