"""Load for an engine in this process: the caller steps it, without server, network or text."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvloom.bench.figures import percentile
from kvloom.bench.prompts import LoadPrompt

LATENCY_PERCENTILES = (10, 25, 50, 75, 90, 99)


class SteppedEngine(Protocol):
    """The part of an engine's interface that a direct load uses."""

    @property
    def has_work(self) -> bool:
        """True while any request waits or runs."""

    def add(self, prompt_token_ids: Sequence[int], params: Any) -> Any:
        """Queue a request."""

    def step(self) -> Sequence[Any]:
        """Run one iteration; returns the requests that got a token."""


@dataclass(frozen=True)
class Run:
    """Requests that were queued at once: seconds to the end of all, to the first token of each, and their tokens."""

    seconds: float
    first: Sequence[float]
    prompt_tokens: int
    output_tokens: int


def run_at_once(engine: SteppedEngine, prompts: Sequence[LoadPrompt], params: Callable[[int], Any]) -> Run:
    """Queue all prompts, step the engine until it has no work, and return what that took.

    `params(n)` are sampling parameters of an answer of n tokens. Raises what `engine.add` and `engine.step` raise.
    """
    started = time.perf_counter()
    for prompt in prompts:
        engine.add(prompt.prompt, params(prompt.max_tokens))  # type: ignore[arg-type]  # token ids, never text
    first: dict[int, float] = {}
    while engine.has_work:
        for request in engine.step():
            first.setdefault(id(request), time.perf_counter() - started)
    seconds = time.perf_counter() - started
    inputs, outputs = sum(len(prompt.prompt) for prompt in prompts), sum(prompt.max_tokens for prompt in prompts)
    return Run(seconds, list(first.values()), inputs, outputs)


def latency_figures(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the figures of the same batch run again and again; seconds."""
    seconds = [run.seconds for run in runs]
    first = [max(run.first) for run in runs]
    return {
        "avg_latency": sum(seconds) / len(seconds),
        "avg_time_to_first_token": sum(first) / len(first),
        "latencies": seconds,
        "percentiles": {str(percent): percentile(seconds, percent) for percent in LATENCY_PERCENTILES},
    }


def throughput_figures(run: Run, requests: int) -> dict[str, Any]:
    """Return the rates of one load; seconds, and requests and tokens a second."""
    total = run.prompt_tokens + run.output_tokens
    return {
        "elapsed_time": run.seconds,
        "num_requests": requests,
        "total_num_tokens": total,
        "total_output_tokens": run.output_tokens,
        "requests_per_second": requests / run.seconds,
        "tokens_per_second": total / run.seconds,
        "output_tokens_per_second": run.output_tokens / run.seconds,
    }
