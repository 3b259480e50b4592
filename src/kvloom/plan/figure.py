"""Figure: a number with its unit and its label. A plan prints no number without them."""

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from kvloom.spec.bounds import Bounds

Label: TypeAlias = Literal["exact", "bound", "assumed", "measured"]

LABELS: dict[Label, str] = {
    "exact": "follows by arithmetic from the model's shape, its files or what was asked",
    "bound": "follows by the same arithmetic and is never exceeded; the actual value depends on the requests",
    "assumed": "depends on an assumption that the note names, or on a vendor's figure",
    "measured": "was measured on this machine or read from a results file",
}


EACH_DEVICE, ALL_DEVICES = "on each device", "all devices together"
"""What a figure of a plan for several devices covers."""


@dataclass(frozen=True)
class Figure:
    """`value` in `unit`; `low` is given where the figure is an upper bound for any data and any other requests.

    A `value` of None is not known; the note says which input is missing.
    """

    value: float | None
    unit: str
    label: Label
    note: str = ""
    low: float | None = None

    def of(self, scope: str) -> "Figure":
        """Return the figure with a note that begins with what it covers."""
        return replace(self, note=f"{scope}; {self.note}" if self.note else scope)

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
    """Return the label of a figure that was computed from figures with `labels`."""
    if "assumed" in labels:
        return "assumed"
    if "measured" in labels:
        return "measured"
    return "bound" if "bound" in labels else "exact"
