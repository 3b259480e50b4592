"""Bounds: a number of bytes, exact or between two ends. Torch-free."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """At least `low` and at most `high` bytes; equal when the figure is exact."""

    low: int
    high: int

    def __add__(self, other: "Bounds") -> "Bounds":
        return Bounds(self.low + other.low, self.high + other.high)

    @property
    def exact(self) -> bool:
        """True when both ends agree."""
        return self.low == self.high

    def union(self, other: "Bounds") -> "Bounds":
        """Return the bounds of the larger of two figures."""
        return Bounds(max(self.low, other.low), max(self.high, other.high))
