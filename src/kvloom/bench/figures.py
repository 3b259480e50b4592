"""Figures of a load: throughput, percentiles of latencies, and goodput."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvloom.bench.load import Outcome
from kvloom.errors import InvalidInputError

METRICS = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2el": "end-to-end latency",
}
"""Latencies that can be reported, by the name that people use."""

Goals = Mapping[str, float]
"""Most milliseconds for a metric, of each request."""


def read_goals(texts: Sequence[str]) -> dict[str, float]:
    """Return the goals in `ttft:500`, `tpot:50`, `e2el:4000`; raises `InvalidInputError`."""
    goals = {}
    for text in texts:
        name, _, limit = text.partition(":")
        try:
            goals[name] = float(limit)
        except ValueError:
            limit = ""
        if name not in ("ttft", "tpot", "e2el") or not limit or goals[name] <= 0:
            raise InvalidInputError(f"{text!r} is not a goal; write e.g. ttft:500, tpot:50 or e2el:4000 (milliseconds)")
    return goals


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the percentile of `values` by linear interpolation between the closest ranks; `values` is not empty."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def latencies(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """Return the seconds of each metric over all answers; `itl` has one entry for each gap between events."""
    good = [outcome for outcome in outcomes if outcome.ok]
    return {
        "ttft": [outcome.ttft for outcome in good if outcome.ttft is not None],
        "tpot": [outcome.tpot for outcome in good if outcome.tpot is not None],
        "itl": [gap for outcome in good for gap in outcome.gaps],
        "e2el": [outcome.end for outcome in good if outcome.end is not None],
    }


def meets(outcome: Outcome, goals: Goals) -> bool:
    """Return whether an answer came and kept within every goal; one token has no TPOT to exceed."""
    found = {"ttft": outcome.ttft, "tpot": outcome.tpot, "e2el": outcome.end}
    return outcome.ok and all((found[name] or 0.0) * 1000 <= limit for name, limit in goals.items())


def summary(
    outcomes: Sequence[Outcome],
    seconds: float,
    *,
    metrics: Sequence[str],
    percentiles: Sequence[float],
    goals: Goals,
) -> dict[str, Any]:
    """Return the figures of a load by name; latencies in milliseconds, rates a second."""
    good = [outcome for outcome in outcomes if outcome.ok]
    prompt, output = sum(o.prompt_tokens for o in good), sum(o.output_tokens for o in good)
    found: dict[str, Any] = {
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "duration_s": seconds,
        "total_input_tokens": prompt,
        "total_cached_tokens": sum(o.cached_tokens for o in good),
        "total_output_tokens": output,
        "request_throughput": len(good) / seconds,
        "output_throughput": output / seconds,
        "total_token_throughput": (prompt + output) / seconds,
        "max_lag_ms": max((o.lag for o in outcomes), default=0.0) * 1000,
    }
    peaks = [o.kv_peak_bytes for o in good if o.kv_peak_bytes is not None]
    if peaks:
        found["mean_kv_peak_bytes"] = sum(peaks) / len(peaks)
    if goals:
        found["request_goodput"] = sum(meets(o, goals) for o in outcomes) / seconds
    values = latencies(outcomes)
    for name in metrics:
        if values[name]:
            found[f"mean_{name}_ms"] = sum(values[name]) / len(values[name]) * 1000
            found[f"median_{name}_ms"] = percentile(values[name], 50) * 1000
            for percent in percentiles:
                found[f"p{percent:g}_{name}_ms"] = percentile(values[name], percent) * 1000
    return found
