"""Explanation: a title, sentences, a table and the figures in them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from kvloom.errors import InvalidInputError
from kvloom.plan.figure import Figure
from kvloom.plan.question import Question
from kvloom.spec.layer import Attention, Latent


@dataclass(frozen=True)
class Explanation:
    """One topic with the numbers of one question; every important number in `lines` and `rows` is in `figures`."""

    topic: str
    title: str
    lines: tuple[str, ...]
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    figures: dict[str, Figure] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """Return the explanation as JSON fields."""
        return {
            "topic": self.topic, "title": self.title, "text": list(self.lines), "header": list(self.header),
            "rows": [list(row) for row in self.rows], "figures": {k: v.json() for k, v in self.figures.items()},
        }  # fmt: skip


Explainer: TypeAlias = Callable[[Question], Explanation]


def attending(asked: Question, topic: str) -> list[Attention | Latent]:
    """Return the mixers of the layers that attend; raises `InvalidInputError` when the model has none."""
    found = [layer.mixer for layer in asked.model.layers if isinstance(layer.mixer, (Attention, Latent))]
    if not found:
        raise InvalidInputError(f"{asked.model.name} has no attention, so {topic!r} does not apply to it")
    return found


def count(number: float) -> str:
    """Return a count with thousands separated, or in short form from a million million."""
    return f"{number:,.0f}" if number < 1e12 else f"{number:.4g}"
