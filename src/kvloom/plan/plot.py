"""Memory over context, a line for each method, as PNG or SVG. Needs matplotlib, which is an extra."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from kvloom.errors import InvalidInputError, UnsupportedError
from kvloom.plan.memory import Memory
from kvloom.plan.question import Question
from kvloom.spec.policy import PolicySpec
from kvloom.units import GIB

SUFFIXES = (".png", ".svg")
STYLES = ("-", "--", ":")
MOST_CONTEXT = 1 << 17
"""Longest context that is drawn of a model without a length of its own."""


def contexts_of(asked: Question, points: int = 32) -> list[int]:
    """Return contexts from 256 tokens upwards, evenly spread on a logarithmic scale, each once.

    The largest is the model's context length, but at most eight times the asked context.
    """
    low = min(256, asked.context)
    high = max(asked.context, min(asked.model.max_position or MOST_CONTEXT, 8 * asked.context))
    return sorted({round(low * (high / low) ** (i / (points - 1))) for i in range(points)} | {asked.context})


def memory_curves(asked: Question, policies: list[PolicySpec]) -> dict[str, list[tuple[int, int]]]:
    """Return (context, bytes on one device) for each policy, all users together."""
    curves: dict[str, list[tuple[int, int]]] = {}
    for policy in policies:
        changed = replace(asked, policy=policy)
        memory = Memory(changed)
        curves[str(policy)] = [(n, memory.cell(n, asked.users)[0]) for n in contexts_of(asked) if n > 1]
    return curves


def draw(asked: Question, policies: list[PolicySpec], path: Path) -> None:
    """Write the plot; raises `InvalidInputError` for another suffix, `UnsupportedError` without matplotlib."""
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidInputError(f"--plot writes {' or '.join(SUFFIXES)}; {path} is neither")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("cannot draw", ["matplotlib is not installed; pip install matplotlib"]) from error
    figure: Any = Figure(figsize=(11, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    curves = memory_curves(asked, policies)
    for index, (name, points) in enumerate(curves.items()):
        style, color = STYLES[index // 10 % len(STYLES)], f"C{index % 10}"
        axes.plot([n for n, _ in points], [size / GIB for _, size in points], style, color=color, label=name)
    memory = Memory(asked)
    usable = memory.usable.value
    if usable is not None:
        axes.axhline(usable / GIB, color="black", linestyle="--", linewidth=1, label=f"usable on {asked.device.name}")
    axes.axhspan(0, (memory.process.weights.value or 0) / GIB, color="0.9", label="weights")
    axes.axvline(asked.context, color="0.5", linestyle=":", linewidth=1, label=f"{asked.context:,} tokens, as asked")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda tokens, position: f"{tokens:,.0f}")
    axes.set_xlim(min(contexts_of(asked)), max(contexts_of(asked)))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("memory of one device (GiB)")
    axes.set_title(f"{asked.model.name}, {asked.users} {'users' if asked.users > 1 else 'user'}")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path)
