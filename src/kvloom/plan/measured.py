"""Measured results: loss of quality, times and bytes of each policy on one model.

Schema `kvloom.measure/1`, which `kvloom measure` writes: {"schema", "model", "machine", "results": [{"policy",
"context", "loss", "loss_high", "metric", "tpot_s", "ttft_s", "kv_bytes", "kv_peak_bytes", "evicted_tokens",
"windows"}]}. `loss` is relative (0.01 is 1 %), `loss_high` the upper end of its interval over `windows` pieces of text;
bytes and times are those of one request of `context` tokens, `evicted_tokens` a sum over lanes. All but policy, context
and loss may be left out; other fields are ignored.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvloom.errors import InvalidInputError
from kvloom.plan.question import Question
from kvloom.spec.policy import PolicySpec

SCHEMA = "kvloom.measure/1"


@dataclass(frozen=True)
class Measurement:
    """One measured policy: `loss` against the full cache, `loss_high` the upper end of its interval; times in s.

    `kv_bytes` were in use at the last token, `kv_peak_bytes` at most; `evicted_tokens` were evicted, over all lanes.
    `windows` pieces of text were measured.
    """

    policy: PolicySpec
    context: int
    loss: float
    loss_high: float
    metric: str
    tpot_s: float | None = None
    ttft_s: float | None = None
    kv_bytes: float | None = None
    kv_peak_bytes: float | None = None
    evicted_tokens: float | None = None
    windows: float | None = None

    def evicted_enough_for(self, prompt: int) -> bool:
        """Return whether the policy evicted tokens when it was measured, if it would evict any of such a prompt.

        A measurement in which the text never exceeded the budget does not show the loss on a longer text.
        """
        kept = self.policy.tokens_kept(prompt)
        return self.evicted_tokens != 0 or not self.policy.evicts or (kept is not None and kept >= prompt)


@dataclass(frozen=True)
class Measurements:
    """All results of one file, of one model on one machine."""

    model: str
    machine: str
    results: tuple[Measurement, ...]
    path: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def check_for(self, asked: Question) -> None:
        """Raise `InvalidInputError` unless these are results of the asked model, kept and run as asked; names both.

        Quality and speed differ for another model, other weights or another device.
        """
        wanted = {"model": asked.model.name, "device": asked.device.kind, "dtype": asked.dtype,
                  "quantization": asked.quantization}  # fmt: skip
        found = {"model": self.model, "device": "cpu", **self.facts}
        different = [
            f"{name} {found[name] or 'none'}, not {value or 'none'}"
            for name, value in wanted.items()
            if name in found and found[name] != value
        ]
        if different:
            raise InvalidInputError(
                f"{self.path} holds results of {'; '.join(different)}. Measure what is planned: kvloom measure"
            )

    def of(self, policy: PolicySpec) -> Measurement | None:
        """Return the measurement of `policy` at its longest context, or None."""
        found = [result for result in self.results if result.policy == policy]
        return max(found, key=lambda result: result.context, default=None)


def read_measurements(path: Path) -> Measurements:
    """Return the results in `path`; raises `InvalidInputError` saying which entry is wrong."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInputError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidInputError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, Mapping) else None
        raise InvalidInputError(f"{path} has schema {found!r}; expected {SCHEMA!r}")
    results = data.get("results")
    if not isinstance(results, list) or not results:
        raise InvalidInputError(f"{path} holds no results")
    found = tuple(_measurement(path, index, entry) for index, entry in enumerate(results))
    facts = data.get("facts")
    return Measurements(
        str(data.get("model", "")), str(data.get("machine", "")), found, str(path),
        dict(facts) if isinstance(facts, Mapping) else {},
    )  # fmt: skip


def _measurement(path: Path, index: int, entry: Any) -> Measurement:
    where = f"result {index} of {path}"
    if not isinstance(entry, Mapping):
        raise InvalidInputError(f"{where} is not a JSON object")
    policy = entry.get("policy")
    if not isinstance(policy, str):
        raise InvalidInputError(f"{where} names no policy")

    def number(key: str, required: bool = True) -> float | None:
        value = entry.get(key)
        if value is None and not required:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InvalidInputError(f"{key} of {where} is {value!r}; it must be a number")
        return float(value)

    loss, context = number("loss"), number("context")
    assert loss is not None and context is not None
    high = number("loss_high", required=False)
    more = ("tpot_s", "ttft_s", "kv_bytes", "kv_peak_bytes", "evicted_tokens", "windows")
    return Measurement(PolicySpec.parse(policy), int(context), loss, loss if high is None else high,
                       str(entry.get("metric", "loss")), **{name: number(name, False) for name in more})
