"""A plan on the terminal: aligned columns, every byte in GiB and in GB, every figure with its label."""

from collections.abc import Iterator

from kvloom.cli.table import table
from kvloom.plan.answer import Plan
from kvloom.plan.compare import Row
from kvloom.plan.explain import Explanation
from kvloom.plan.figure import Figure
from kvloom.units import GIB, format_bytes

_NAMES = {
    "kv_per_token": "KV per token", "kv_per_request": "KV per request", "kv_total": "KV of all users",
    "loading": "loading, above weights",
    "state_per_request": "state per request", "weights_on_disk": "weights on disk", "max_users": "users that fit",
    "max_context": "context that fits", "ttft_lower_bound": "TTFT at least", "tpot_lower_bound": "TPOT at least",
    "tpot_uniform_routing": "TPOT, experts at random", "decode_weight_bytes": "weights read per step",
    "decode_kv_bytes": "KV read per step", "decode_flops": "operations per step", "prefill_flops": "operations per "
                                                                                                   "prompt",
    "kv_bound_context": "bound by KV from", "tokens_per_s_at_best": "tokens/s at best", "tpot_measured": "TPOT "
                                                                                                         "measured",
    "ttft_measured": "TTFT measured", "loss_measured": "loss measured",
    "kv_measured": "KV measured",
}  # fmt: skip


def show_bytes(value: float) -> str:
    """Return bytes in a binary and in a decimal unit: `1.25 GiB = 1.342 GB`."""
    if value < 1000:
        return f"{value:.4g} B"
    decimal = value / 1000
    for unit in ("kB", "MB", "GB"):
        if abs(decimal) < 1000 or unit == "GB":
            return f"{_binary(value)} = {decimal:,.4g} {unit}"
        decimal /= 1000
    raise AssertionError("unreachable: the last unit always returns")


def _seconds(value: float) -> str:
    return f"{value * 1000:,.4g} ms" if value < 1 else f"{value:,.4g} s"


def _binary(value: float) -> str:
    return f"{value / GIB:,.4g} GiB" if value >= GIB else format_bytes(round(value))


def show(figure: Figure) -> str:
    """Return the value of a figure with its unit, or `unknown`; a range when it has a lower end."""
    if figure.value is None:
        return "unknown" if figure.unit in ("s", "bytes") else "-"
    if figure.unit == "bytes":
        text = show_bytes(figure.value)
        return text if figure.low is None else f"{_binary(figure.low)} to {text}"
    if figure.unit == "s":
        text = _seconds(figure.value)
        return text if figure.low is None else f"{_seconds(figure.low)} to {text}"
    if figure.unit == "share":
        return f"{figure.value:.2%}"
    amount = f"{figure.value:.4g}" if figure.value >= 1e9 else f"{figure.value:,.0f}"
    return f"{amount} {figure.unit}"


def _figures(title: str, figures: dict[str, Figure]) -> Iterator[str]:
    yield ""
    rows = [(_NAMES.get(name, name), show(figure), figure.label, figure.note) for name, figure in figures.items()]
    yield from table((title, "", "how known", ""), rows)


def plan_text(plan: Plan) -> str:
    """Return the plan and all explanations and comparisons in it as text."""
    return "\n".join(_lines(plan)) + "\n"


def _lines(plan: Plan) -> Iterator[str]:
    asked = plan.question
    model, device = asked.model, asked.device
    many = f"{asked.devices} x " if asked.devices > 1 else ""
    yield (
        f"{model.name} ({model.num_params / 1e9:.4g} billion weights, {model.num_layers} layers, "
        f"{model.attention_kind}) "
        f"on {many}{device.name}"
    )
    weights = "" if asked.quantization is None else f" with weights in {asked.quantization}"
    yield (
        f"{asked.users} users, {asked.context} tokens each ({asked.prompt} prompt + {asked.output} output), "
        f"{asked.dtype}{weights}, policy {asked.policy}, blocks of {asked.block_size}"
    )
    yield f"source of the model: {model.source or 'as given'}"
    speed = "measured" if device.measured else f"{device.source}, {device.as_of}"
    yield f"source of the device: {speed}"
    yield from (f"note: {warning}" for warning in plan.warnings)
    verdict = {True: "FITS", False: "DOES NOT FIT", None: "UNKNOWN (the memory of the device is not known)"}
    yield ""
    usable = plan.sizes["usable"]
    yield f"{verdict[plan.memory.fits]}: {show(plan.sizes['total'])} of {show(usable)}" + (
        " a device" if asked.devices > 1 else ""
    )
    yield from _figures("memory" if asked.devices == 1 else "memory of a device", plan.sizes)
    yield from _figures("limits", plan.limits)
    yield from _figures("speed", plan.speeds)
    for name, possible in plan.targets.items():
        word = {True: "possible by the lower bound", False: "impossible here", None: "unknown, speed not known"}[
            possible
        ]
        yield f"target {name.upper()}: {word}"
    yield from _grid(plan)
    if plan.advice:
        yield ""
        rows = [(a.change, a.flags, a.cost, "yes" if a.enough else "not alone") for a in plan.advice]
        yield from table(("what to change, cheapest first", "flags of kvloom plan", "cost", "enough"), rows)
    for what, found in plan.comparisons.items():
        yield from _comparison(what, found, asked.users, asked.context)
    for explanation in plan.explanations:
        yield from _explanation(explanation)
    if plan.recommendation is not None:
        yield ""
        chosen = plan.recommendation
        yield f"recommendation: {chosen.policy if chosen.policy is not None else 'none yet'} ({chosen.promise})"
        if chosen.command:
            yield f"  {chosen.command}"


def _grid(plan: Plan) -> Iterator[str]:
    contexts, users, cells = plan.grid
    yield ""
    header = ("context x users, GiB a device", *[str(n) for n in users])
    marks = {True: "", False: " no", None: " ?"}
    rows = [
        (f"{context:,}", *[f"{size / GIB:,.1f}{marks[fits]}" for size, fits in row])
        for context, row in zip(contexts, cells, strict=True)
    ]
    yield from table(header, rows, right=True)


def _comparison(what: str, found: list[Row], users: int, context: int) -> Iterator[str]:
    yield ""
    rows = [
        (
            row.name,
            show(row.bytes_per_token),
            show(row.kv_of_request),
            _count(row.max_users),
            _count(row.max_context),
            show(row.tpot),
            row.kv_of_request.label,
            row.note,
        )
        for row in found
    ]
    header = (what, "KV per token", f"KV of {context} tokens", "users", f"context for {users}", "TPOT at least")
    yield from table((*header, "how known", ""), rows)


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _explanation(explanation: Explanation) -> Iterator[str]:
    yield ""
    yield explanation.title
    yield from (f"  {line}" for line in explanation.lines)
    if explanation.rows:
        yield ""
        yield from table(explanation.header, explanation.rows, indent=2)
