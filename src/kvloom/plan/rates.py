"""Rates: how fast a device reads and computes, and the time that work takes at those rates."""

from dataclasses import dataclass

from kvloom.plan.figure import Figure, Label
from kvloom.plan.question import Question


@dataclass(frozen=True)
class Rates:
    """Peak and bandwidth of the device of a `Question`, for its dtype and quantization."""

    question: Question

    @property
    def peak_stands_in(self) -> bool:
        """Whether products have 8-bit activations whose peak is not known, so that the peak of the dtype is used.

        Low-bit weights with activations of 16 or 32 bits are multiplied in the dtype.
        """
        return self.question.quantization == "w8a8" and self.question.device.peak("w8a8") is None

    @property
    def _multiplies_fp8(self) -> bool:
        model = self.question.model
        native = model.weight_format is not None and model.weight_format.name == "fp8"
        kept = native and self.question.dtype == model.dtype and self.question.quantization is None
        return kept and self.question.device.peak("float8_e4m3fn") is not None

    @property
    def peak(self) -> float | None:
        """Operations per second; None when not known.

        Weights that a checkpoint keeps in FP8 may be multiplied at the peak of FP8, where the device has one.
        """
        if self._multiplies_fp8:
            return self.question.device.peak("float8_e4m3fn")
        own = self.question.quantization == "w8a8" and not self.peak_stands_in
        return self.question.device.peak("w8a8" if own else self.question.dtype)

    @property
    def speed_label(self) -> Label:
        """Label of the device's speed; a peak of another dtype makes it assumed."""
        return "measured" if self.question.device.measured and not self.peak_stands_in else "assumed"

    @property
    def ridge(self) -> float | None:
        """Operations per byte above which the device is bound by arithmetic; None when its speed is not known."""
        peak, bandwidth = self.peak, self.question.device.bandwidth
        return None if peak is None or not bandwidth else peak / bandwidth

    def time(self, moved: float, work: float) -> Figure:
        """Return the least seconds to read `moved` bytes and compute `work` operations on one device."""
        device = self.question.device
        peak = self.peak
        if device.bandwidth is None or peak is None:
            note = f"no peak for {self.question.dtype} in the device table"
            if device.kind == "cpu":
                note = "speed of the device not known; `kvloom plan --probe` measures this machine"
            return Figure(None, "s", "assumed", note)
        memory, arithmetic = moved / device.bandwidth, work / peak
        if memory >= arithmetic:
            return Figure(memory, "s", "measured" if device.measured else "assumed", "lower bound, set by bandwidth")
        if self.peak_stands_in:
            note = f"between bandwidth and the peak of {self.question.dtype}: that of 8-bit activations is not known"
            return Figure(arithmetic, "s", "assumed", note, memory)
        return Figure(arithmetic, "s", self.speed_label, "lower bound, set by arithmetic")
