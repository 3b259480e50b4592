"""Figure: a number with its unit and how it is known. Nothing in a plan is printed without one."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from kvloom.spec.bounds import Bounds

Label: TypeAlias = Literal["exact", "bound", "assumed", "measured"]

LABELS: dict[Label, str] = {
    "exact": "follows by arithmetic from the model's shape, its files or what was asked",
    "bound": "follows by the same arithmetic and is never exceeded; what it comes to below that depends on what is run",
    "assumed": "rests on an assumption that the note names, or on a vendor's figure",
    "measured": "was measured on this machine or read from a results file",
}


@dataclass(frozen=True)
class Figure:
    """`value` in `unit`; `low` is given where the figure is an upper bound, which holds for any data and company.

    A `value` of None is not known; the note says what it would need.
    """

    value: float | None
    unit: str
    label: Label
    note: str = ""
    low: float | None = None

    def json(self) -> dict[str, Any]:
        """Return the figure as JSON fields; `low` and `note` only where there are any."""
        fields: dict[str, Any] = {"value": self.value, "unit": self.unit, "label": self.label}
        if self.low is not None:
            fields["low"] = self.low
        if self.note:
            fields["note"] = self.note
        return fields


def of_bounds(bounds: Bounds, note: str = "") -> Figure:
    """Return bytes from bounds: exact when both ends agree, else the upper one with the lower beside it and `note`."""
    if bounds.exact:
        return Figure(bounds.high, "bytes", "exact")
    return Figure(bounds.high, "bytes", "bound", note, bounds.low)


def weakest(*labels: Label) -> Label:
    """Return how a figure is known that was computed from figures known like `labels`."""
    if "assumed" in labels:
        return "assumed"
    if "measured" in labels:
        return "measured"
    return "bound" if "bound" in labels else "exact"
