"""Results: all measurements so far, in a file from which a later run continues.

The file has schema `kvloom.measure/1`, which the planner reads (`kvloom.plan.measured`). Each result also holds the
figures of every window, `by_window`, and of every run alone, `costs`, from which it was computed.
"""

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvloom.errors import InvalidInputError
from kvloom.measure.cost import Cost
from kvloom.measure.forced import Score
from kvloom.measure.interval import bootstrap_interval
from kvloom.models.cache_dir import write_atomically
from kvloom.plan.measured import SCHEMA, read_measurements
from kvloom.spec.policy import FULL, PolicySpec

METRIC = "perplexity"


@dataclass
class Row:
    """Measurements of one policy at one context: scores by window, in the order of the windows, and costs."""

    policy: PolicySpec
    context: int
    output: int
    scores: list[Score] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)


class Results:
    """Rows of one model on one text; `facts` must be equal for a run to continue."""

    def __init__(self, model: str, machine: str, facts: Mapping[str, Any]) -> None:
        self.model = model
        self.machine = machine
        self.facts = dict(facts)
        self.rows: list[Row] = []

    @classmethod
    def open(cls, path: Path, model: str, machine: str, facts: Mapping[str, Any]) -> "Results":
        """Return what `path` holds, empty when there is no such file.

        Raises `InvalidInputError` for a file of something else, naming what differs.
        """
        results = cls(model, machine, facts)
        if not path.exists():
            return results
        read_measurements(path)
        data = json.loads(path.read_text(encoding="utf-8"))
        known = {"model": data.get("model"), **(data.get("facts") or {})}
        wanted = {"model": model, **results.facts}
        different = [f"{k} {known.get(k)!r}, not {value!r}" for k, value in wanted.items() if known.get(k) != value]
        if different:
            why = "; ".join(different)
            raise InvalidInputError(f"{path} holds results of another run ({why}); give another file or remove it")
        results.rows = [_row(path, entry) for entry in data["results"]]
        return results

    def row(self, policy: PolicySpec, context: int, output: int) -> Row:
        """Return the row of `policy` at `context` tokens of which `output` are scored, a new one if there is none."""
        for row in self.rows:
            if (row.policy, row.context, row.output) == (policy, context, output):
                return row
        self.rows.append(Row(policy, context, output))
        return self.rows[-1]

    def summaries(self) -> list[dict[str, Any]]:
        """Return one result for each policy that has a score, with means and intervals."""
        full = {(row.context, row.output): row for row in self.rows if row.policy == FULL}
        return [_summary(row, full[row.context, row.output]) for row in self.rows if row.scores]

    def json(self) -> dict[str, Any]:
        """Return all results as schema `kvloom.measure/1`."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "machine": self.machine,
            "facts": self.facts,
            "results": self.summaries(),
        }

    def save(self, path: Path) -> None:
        """Replace `path` by the present results; nothing is written before there is one."""
        if self.summaries():
            text = json.dumps(self.json(), indent=1, allow_nan=False) + "\n"
            write_atomically(path, lambda file: file.write(text.encode()))


def _summary(row: Row, full: Row) -> dict[str, Any]:
    """Return the result of `row` as JSON fields, against the same windows of the full cache."""
    scores, reference = row.scores, full.scores[: len(row.scores)]
    change = [score.nll - other.nll for score, other in zip(scores, reference, strict=True)]
    low, high = bootstrap_interval(change)
    kl = [score.kl for score in scores]
    kl_low, kl_high = bootstrap_interval(kl)
    nll = statistics.fmean(score.nll for score in scores)
    found = {
        "policy": str(row.policy),
        "context": row.context,
        "output": row.output,
        "windows": len(scores),
        "metric": METRIC,
        "loss": math.expm1(statistics.fmean(change)),
        "loss_low": math.expm1(low),
        "loss_high": math.expm1(high),
        "perplexity": math.exp(nll),
        "kl": statistics.fmean(kl),
        "kl_low": kl_low,
        "kl_high": kl_high,
        "agreement": statistics.fmean(score.agreement for score in scores),
        "evicted_tokens": statistics.fmean(score.evicted for score in scores),
    }
    if row.costs:
        for name in ("ttft_s", "tpot_s"):
            times = [getattr(cost, name) for cost in row.costs]
            found |= {name: statistics.median(times), f"{name}_min": min(times), f"{name}_max": max(times)}
        for name in ("kv_bytes", "kv_peak_bytes"):
            found[name] = max(getattr(cost, name) for cost in row.costs)
    by_window = {name: [getattr(score, name) for score in scores] for name in ("nll", "kl", "agreement", "evicted")}
    return found | {"by_window": by_window, "costs": [asdict(cost) for cost in row.costs]}


def _row(path: Path, entry: Mapping[str, Any]) -> Row:
    """Return the row from which a result was computed; raises `InvalidInputError` when the file lacks it."""
    try:
        columns = entry["by_window"]
        parts = zip(*(columns[name] for name in ("nll", "kl", "agreement", "evicted")), strict=True)
        scores = [Score(float(nll), float(kl), float(agreement), int(evicted)) for nll, kl, agreement, evicted in parts]
        costs = [Cost(**cost) for cost in entry["costs"]]
        return Row(PolicySpec.parse(entry["policy"]), int(entry["context"]), int(entry["output"]), scores, costs)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"{path} does not say how {entry.get('policy')} was measured ({error}), so a run cannot continue from it; "
            "give another file"
        ) from error
