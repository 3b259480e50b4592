"""Devices: memory, bandwidth and peak arithmetic, each row with its source and the day on which it was read."""

import os
import re
from dataclasses import dataclass, replace

from kvloom.errors import InvalidInputError
from kvloom.registry import Registry, nearest
from kvloom.units import GIB, parse_bytes

_READ = "2026-11-22"


@dataclass(frozen=True)
class DeviceSpec:
    """One accelerator or host. Bandwidth in bytes/s and peaks in FLOP/s are best cases; None is not known.

    `peaks` maps a dtype to its dense matrix peak (no sparsity). `measured` says that speed was probed on the machine,
    and `runtime_bytes` is what an engine's process was found to take before it loads a model.
    """

    name: str
    memory_bytes: int | None
    bandwidth: float | None = None
    peaks: tuple[tuple[str, float], ...] = ()
    kind: str = "gpu"
    source: str = ""
    as_of: str = _READ
    measured: bool = False
    runtime_bytes: int | None = None

    def peak(self, dtype: str) -> float | None:
        """Return the peak for `dtype`; 16-bit formats stand in for each other, float32 for what is missing."""
        table = dict(self.peaks)
        for name in (dtype, "bfloat16" if dtype == "float16" else "float16" if dtype == "bfloat16" else dtype):
            if name in table:
                return table[name]
        return None


DEVICES: Registry[DeviceSpec] = Registry("device")


def _gpu(name: str, gib: float, gb_s: float, bf16: float, fp8: float | None, fp32: float | None, source: str) -> None:
    peaks = [("bfloat16", bf16 * 1e12)]
    if fp8 is not None:
        peaks.append(("float8_e4m3fn", fp8 * 1e12))
    if fp32 is not None:
        peaks.append(("float32", fp32 * 1e12))
    DEVICES.register(name, DeviceSpec(name, round(gib * GIB), gb_s * 1e9, tuple(peaks), source=source))


_GLENN = "glennklockwood.com/garden/processors, quoting NVIDIA's data sheet and white paper"
_BOOK = "llmbook.apartsin.com appendix G.1, quoting vendors' data sheets"
_HMC = "hmc-tech.com comparison tables"

_gpu("a100-40", 40, 1555, 312, None, 19.5, _GLENN)
_gpu("a100-80", 80, 2039, 312, None, 19.5, _GLENN)
_gpu("h100", 80, 3350, 989.4, 1978.9, 66.9, _GLENN)
_gpu("h200", 143771 / 1024, 4800, 989.4, 1978.9, 66.9, f"{_BOOK}; peaks: {_GLENN}; memory: nvidia-smi")
_gpu("b200", 192e9 / GIB, 8000, 2250, 4500, None, _BOOK)
_gpu("l40s", 48, 864, 362, 733, 91.6, f"{_BOOK}; float32: {_HMC}")
_gpu("l4", 24, 300, 125.3, 250.7, 31.3, f"{_HMC}; bandwidth: fpsbench.com")
_gpu("rtx4090", 24, 1008, 165.2, 330.3, 82.6, "waredb.com processor table; gigagpu.com for float32 accumulation")
_gpu("mi300x", 192, 5300, 1307, 2615, None, _BOOK)


def host_memory() -> int | None:
    """Return the physical memory of this machine in bytes, None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def find_device(text: str, probed: DeviceSpec | None = None) -> DeviceSpec:
    """Return the device that `text` names: a row of the table, `cpu`, `cpu:64GiB`, or a row with other memory.

    `cpu` is this machine; its speed is known only when it was `probed`. Raises `InvalidInputError` with the nearest
    name.
    """
    name, colon, size = text.strip().lower().partition(":")
    if name == "cpu":
        device = DeviceSpec("cpu", host_memory(), kind="cpu", source="this machine")
        if probed is not None:
            device = replace(probed, name="cpu", memory_bytes=device.memory_bytes)
    elif name in DEVICES:
        device = DEVICES.get(name)
    else:
        known = ["cpu", *DEVICES]
        raise InvalidInputError(
            f"unknown device {text!r}{nearest(re.sub('[-_ ]', '', name), known)}; known: {', '.join(known)}, cpu:64GiB"
        )
    if not colon:
        return device
    memory = parse_bytes(size)
    if memory < 1:
        raise InvalidInputError(f"device {text!r} has no memory; write e.g. cpu:64GiB")
    return replace(device, name=f"{name}:{size}", memory_bytes=memory, source=f"{device.source}; memory as given")
