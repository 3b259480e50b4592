"""The policy to serve with, chosen by measured losses; without measurements, the policies to measure."""

import shlex
from dataclasses import dataclass, replace
from typing import Any

from kvloom.errors import InvalidInputError, KvloomError
from kvloom.plan.compare import candidate_policies
from kvloom.plan.measured import Measurement, Measurements
from kvloom.plan.memory import Memory
from kvloom.plan.question import Question
from kvloom.plan.serving import policy_refusals, serve_command, serve_refusals, served_name
from kvloom.spec.policy import FULL, PolicySpec


@dataclass(frozen=True)
class Recommendation:
    """`policy` to serve with and its `command`, or None and the candidates that must be measured first.

    `promise` gives the reason for the choice, and why there is no command where kvloom cannot serve it; `measurement`
    is None where the choice needs no measurement.
    """

    policy: PolicySpec | None
    command: str
    promise: str
    measurement: Measurement | None = None
    candidates: tuple[PolicySpec, ...] = ()

    def json(self) -> dict[str, Any]:
        """Return the recommendation as JSON fields."""
        return {
            "policy": None if self.policy is None else str(self.policy), "command": self.command,
            "promise": self.promise, "label": "exact" if self.measurement is None else "measured",
            "candidates": [str(policy) for policy in self.candidates],
        }  # fmt: skip


def parse_loss(text: str) -> float:
    """Return the fraction that `1%` or `0.01` names; raises `InvalidInputError`."""
    try:
        value = float(text[:-1]) / 100 if text.strip().endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise InvalidInputError(f"--max-loss is {text!r}; write a share from 0% to below 100%, e.g. 1%")
    return value


def recommend(asked: Question, model: str, max_loss: float, measured: Measurements | None) -> Recommendation:
    """Return the fitting policy of least loss; among equals the one that needs less memory.

    The full cache is taken when it fits. A measured policy counts when the upper end of its loss is at most
    `max_loss` and it was measured at no less than half the asked context, where it did evict tokens.
    """
    full = replace(asked, policy=FULL)
    if Memory(full).fits:
        return _serve(full, model, "the full cache fits, so no tokens need to be evicted")
    if Memory(full).fits is None:
        raise InvalidInputError("a recommendation needs the memory of the device; give e.g. --device cpu:64GiB")
    if measured is None:
        return _what_to_measure(asked, model, max_loss, "no measurements were given (--measured results.json)")
    good: list[tuple[float, int, Measurement]] = []
    for result in measured.results:
        try:
            changed = replace(asked, policy=result.policy)
            memory = Memory(changed)
            fits, needed = memory.fits and not policy_refusals(changed), memory.kv_bytes(changed)
        except KvloomError:
            continue  # the block size does not suit that store
        near = 2 * result.context >= asked.context and result.evicted_enough_for(asked.prompt)
        if fits and near and result.loss_high <= max_loss:
            good.append((result.loss_high, needed, result))
    if not good:
        count = len(measured.results)
        why = f"none of {count} measured policies fits and loses at most {max_loss:.2%} at such a context"
        return _what_to_measure(asked, model, max_loss, why, measured)
    best = min(good, key=lambda entry: entry[:2])[2]
    promise = (
        f"at most {max(0.0, best.loss_high):.2%} loss of {best.metric} measured at {best.context} tokens"
        f"{'' if best.windows is None else f' over {best.windows:.0f} windows'}"
        f"{f' on {measured.machine}' if measured.machine else ''}"
    )
    return _serve(replace(asked, policy=best.policy), model, promise, best)


def _serve(asked: Question, model: str, promise: str, measurement: Measurement | None = None) -> Recommendation:
    """Return the recommendation to serve `asked`, with a command only where kvloom can."""
    reasons = serve_refusals(asked)
    if reasons:
        promise = f"{promise}; no command, because {'; '.join(reasons)}"
    return Recommendation(asked.policy, "" if reasons else serve_command(asked, model), promise, measurement)


def _what_to_measure(
    asked: Question, model: str, max_loss: float, why: str, measured: Measurements | None = None
) -> Recommendation:
    fitting = []
    for policy in candidate_policies(asked):
        changed = replace(asked, policy=policy)
        known = measured is not None and measured.of(policy) is not None
        if not policy_refusals(changed) and not known and Memory(changed).fits:
            fitting.append(policy)
    if not fitting:
        return Recommendation(None, "", f"{why}, and none of the usual policies fits; see what to change")
    least = -(-asked.context // 2)
    command = ["kvloom", "measure", served_name(model), "--text", "FILE", "--context", str(least)]
    command += ["--json", "results.json"]
    if asked.quantization is not None:
        command += ["--quantization", asked.quantization]
    command += [part for policy in fitting for part in ("--kv-policy", str(policy))]
    promise = (
        f"{why}; these would fit and may lose less than {max_loss:.2%}: {', '.join(map(str, fitting))}. It needs their "
        f"loss at {least} tokens or more, as --measured results.json (schema kvloom.measure/1): {shlex.join(command)}"
    )
    return Recommendation(None, "", promise, None, tuple(fitting))
