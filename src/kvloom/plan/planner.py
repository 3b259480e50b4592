"""`plan`: the answer to one question, from Python and for the command line; its keywords are the flags."""

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from kvloom.errors import InvalidInputError
from kvloom.plan.answer import Plan
from kvloom.plan.compare import compare as compared
from kvloom.plan.explain import explain as explained
from kvloom.plan.hub import hub_fetch
from kvloom.plan.measured import read_measurements
from kvloom.plan.probe import load_probe
from kvloom.plan.question import DEFAULT_BLOCK_SIZE, DEFAULT_CHUNK, DEFAULT_UTILIZATION, Question
from kvloom.plan.recommend import parse_loss, recommend
from kvloom.plan.source import find_model
from kvloom.registry import nearest
from kvloom.spec.hardware import DeviceSpec, find_device
from kvloom.spec.hypothetical import Hypothesis
from kvloom.spec.model import ModelSpec
from kvloom.spec.policy import PolicySpec

DESCRIBING = tuple(entry.name for entry in fields(Hypothesis) if entry.name != "dtype")
"""Keywords that describe a model that does not exist."""


def plan(
    model: str | Path | None = None,
    device: str = "cpu",
    *,
    devices: int = 1,
    context: int | None = None,
    prompt: int | None = None,
    output: int | None = None,
    users: int = 1,
    kv_policy: str | PolicySpec = "full",
    dtype: str = "auto",
    quantization: str | None = None,
    block_size: int = DEFAULT_BLOCK_SIZE,
    max_num_batched_tokens: int = DEFAULT_CHUNK,
    gpu_memory_utilization: float = DEFAULT_UTILIZATION,
    bandwidth: float | None = None,
    peak: float | None = None,
    target_ttft: str | float | None = None,
    target_tpot: str | float | None = None,
    compare: str | Sequence[str] = (),
    explain: str | Sequence[str] = (),
    max_loss: str | float | None = None,
    measured: str | Path | None = None,
    **described: int | bool | None,
) -> Plan:
    """Return the plan of `model` on `device`; every keyword is the flag of `kvloom plan` of that name.

    `model` is a folder, a config.json, a .gguf file, a Hugging Face id or a name of the catalogue; without it
    `layers`, `heads` and the further flags of a model that does not exist describe one (`described`). Lengths are
    tokens, `bandwidth` is GB/s, `peak` TFLOP/s; targets are seconds or texts such as "50ms", `max_loss` is a share or
    a text such as "1%". No weights are read; at most a config.json is fetched, unless `HF_HUB_OFFLINE` is set.
    Raises `InvalidInputError`, `ModelNotFoundError`, `UnsupportedError` for what cannot be planned, `CheckpointError`
    for damaged files and `DownloadError` when the hub is needed and out of reach.
    """
    whole = {
        "devices": devices, "users": users, "block_size": block_size,
        "max_num_batched_tokens": max_num_batched_tokens,
        **{name: n for name, n in (("context", context), ("prompt", prompt), ("output", output)) if n is not None},
    }  # fmt: skip
    for name, count in whole.items():
        _check_number(name, count, int)
    measurable = {"gpu_memory_utilization": gpu_memory_utilization, "bandwidth": bandwidth, "peak": peak}
    for name, value in measurable.items():
        if value is not None:
            _check_number(name, value, int | float)
    spec = _model(model, described)
    on = _device(device, bandwidth, peak)
    tokens = lengths(context, prompt, output, spec.max_position)
    if dtype == "auto":
        dtype = "bfloat16" if on.kind == "cpu" or spec.dtype == "float8_e4m3fn" else spec.dtype
    policy = PolicySpec.parse(kv_policy) if isinstance(kv_policy, str) else kv_policy
    asked = Question(
        spec, on, *tokens, users, policy, dtype, devices, block_size, max_num_batched_tokens, gpu_memory_utilization,
        seconds("--target-ttft", target_ttft), seconds("--target-tpot", target_tpot), quantization,
    )  # fmt: skip
    results = None if measured is None else read_measurements(Path(measured))
    if results is not None:
        results.check_for(asked)
    recommendation = None
    if max_loss is not None:
        recommendation = recommend(
            asked, spec.name if model is None else str(model), parse_loss(str(max_loss)), results
        )
    return Plan(
        asked,
        results,
        {what: compared(asked, what) for what in dict.fromkeys(_several(compare))},
        tuple(explained(asked, topic) for topic in dict.fromkeys(_several(explain))),
        recommendation,
    )


def lengths(context: int | None, prompt: int | None, output: int | None, longest: int | None) -> tuple[int, int]:
    """Return (prompt, output) tokens; raises `InvalidInputError` when what was given cannot be true together.

    The context defaults to 4096 tokens or the model's, whichever is less, and an eighth of it is output.
    """
    for flag, value, least in (("--context", context, 2), ("--prompt", prompt, 1), ("--output", output, 0)):
        if value is not None and value < least:
            raise InvalidInputError(f"{flag} is {value}; it must be at least {least}")
    if prompt is not None and output is not None:
        if context is not None and context != prompt + output:
            raise InvalidInputError(
                f"--context {context} contradicts --prompt {prompt} and --output {output}, which make {prompt + output}"
            )
        return prompt, output
    whole = context or max(min(4096, longest or 4096), (prompt or 0) * 9 // 8, (output or 0) * 8)
    if prompt is None and output is None:
        output = max(1, whole // 8)
    if prompt is not None:
        output = whole - prompt
    assert output is not None
    if (prompt is not None and output < 0) or whole - output < 1:
        given = f"--prompt {prompt}" if prompt is not None else f"--output {output}"
        raise InvalidInputError(f"--context {whole} leaves no room beside {given}; raise --context")
    return whole - output, output


def seconds(flag: str, text: str | float | None) -> float | None:
    """Return the seconds that `50ms`, `0.05s`, `0.05` or a number names; raises `InvalidInputError`."""
    if text is None or (isinstance(text, int | float) and not isinstance(text, bool)):
        return text
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|)\s*", str(text))
    if match is None:
        raise InvalidInputError(f"{flag} is {text!r}; write seconds or e.g. 50ms")
    return float(match[1]) / (1000 if match[2] == "ms" else 1)


def _check_number(name: str, value: Any, kind: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        wanted = "a whole number" if kind is int else "a number"
        raise InvalidInputError(f"--{name.replace('_', '-')} is {value!r}; it must be {wanted}")


def _several(names: str | Sequence[str]) -> Sequence[str]:
    return (names,) if isinstance(names, str) else names


def _device(name: str, bandwidth: float | None, peak: float | None) -> DeviceSpec:
    found = find_device(name, load_probe() if name.lower().startswith("cpu") else None)
    return found.with_speed(None if bandwidth is None else bandwidth * 1e9, None if peak is None else peak * 1e12)


def _model(model: str | Path | None, described: dict[str, Any]) -> ModelSpec:
    """Return the shape of `model`, or of the one that `described` gives; raises `InvalidInputError` for both."""
    for name in described:
        if name not in DESCRIBING:
            raise InvalidInputError(
                f"plan() has no argument {name!r}{nearest(name, list(DESCRIBING))}; it takes the flags of `kvloom plan`"
            )
    given = {name: value for name, value in described.items() if value not in (None, False)}
    if given and model is not None:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InvalidInputError(f"MODEL {str(model)!r} and {flags} contradict each other: name a model or describe one")
    if given:
        for name, value in given.items():
            if name != "yoco":
                _check_number(name, value, int)
        if "layers" not in given or "heads" not in given:
            raise InvalidInputError("a hypothetical model needs at least --layers and --heads")
        return Hypothesis(**given).build()
    if model is None:
        raise InvalidInputError(
            "name a MODEL, or describe one with --layers and --heads; --list-models shows known ones"
        )
    return find_model(str(model), hub_fetch())
