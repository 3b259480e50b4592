"""Devices: memory, bandwidth and peak arithmetic, each row with its source and the day on which it was read."""

import os
import re
from dataclasses import dataclass, replace

from kvloom.errors import InvalidInputError
from kvloom.registry import Registry, nearest
from kvloom.units import GIB, parse_bytes

_READ = "2026-11-22"
_PEAK_DTYPES = ("bfloat16", "float32", "float8_e4m3fn", "w8a8")


@dataclass(frozen=True)
class DeviceSpec:
    """One accelerator or host. Bandwidth in bytes/s and peaks in FLOP/s are best cases; None is not known.

    `peaks` maps a dtype to its dense matrix peak (no sparsity). `measured` is true where speed was probed on the
    machine, and `runtime_bytes` are the measured bytes of an engine's process before it loads a model.
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
        """Return the peak for `dtype`, that of the other 16-bit format where it is missing, else None."""
        table = dict(self.peaks)
        for name in (dtype, "bfloat16" if dtype == "float16" else "float16" if dtype == "bfloat16" else dtype):
            if name in table:
                return table[name]
        return None

    def with_speed(self, bandwidth: float | None = None, peak: float | None = None) -> "DeviceSpec":
        """Return the device with another bandwidth (bytes/s) or peak (FLOP/s, in every dtype); None leaves its own.

        Raises `InvalidInputError` for values that are not above 0.
        """
        for name, value in (("bandwidth", bandwidth), ("peak", peak)):
            if value is not None and not 0 < value < float("inf"):
                raise InvalidInputError(f"--{name} is {value:g}; it must be above 0")
        device = self
        if bandwidth is not None:
            device = replace(device, bandwidth=bandwidth, source=f"{device.source}; bandwidth as given", measured=False)
        if peak is not None:
            peaks = tuple((dtype, peak) for dtype in _PEAK_DTYPES)
            device = replace(device, peaks=peaks, source=f"{device.source}; peak as given", measured=False)
        return device


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

_SMI = "memory: as nvidia-smi reports it"
_SHEET = "NVIDIA's data sheet, dense rates, quoted without a copy at hand"
_AMD = "AMD's data sheet, dense rates, quoted without a copy at hand"

_gpu("a100-40", 40, 1555, 312, None, 19.5, _GLENN)
_gpu("a100-80", 80, 2039, 312, None, 19.5, _GLENN)
_gpu("h100", 81559 / 1024, 3350, 989.4, 1978.9, 66.9, f"{_GLENN}; {_SMI}")
_gpu("h100-nvl", 95830 / 1024, 3938, 835.5, 1671, 60, f"{_SHEET}; {_SMI}")
_gpu("h20", 97871 / 1024, 4000, 148, 296, 44, f"{_SHEET}; {_SMI}")
_gpu("h200", 143771 / 1024, 4800, 989.4, 1978.9, 66.9, f"{_BOOK}; peaks: {_GLENN}; memory: nvidia-smi")
_gpu("gh200", 97871 / 1024, 4000, 989.4, 1978.9, 66.9, f"{_SHEET} (96 GB); {_SMI}")
_gpu("b200", 192e9 / GIB, 8000, 2250, 4500, None, _BOOK)
_gpu("b300", 288e9 / GIB, 8000, 2250, 4500, None, _SHEET)
_gpu("l40s", 46068 / 1024, 864, 362, 733, 91.6, f"{_BOOK}; float32: {_HMC}; {_SMI}")
_gpu("l4", 23034 / 1024, 300, 125.3, 250.7, 31.3, f"{_HMC}; bandwidth: fpsbench.com; {_SMI}")
_gpu("a10", 23028 / 1024, 600, 125, None, 31.2, f"{_SHEET}; {_SMI}")
_gpu("a6000", 49140 / 1024, 768, 154.8, None, 38.7, f"{_SHEET}; {_SMI}")
_gpu("rtx3090", 24, 936, 71, None, 35.6, f"{_SHEET}, float32 accumulation")
_gpu("rtx4090", 24, 1008, 165.2, 330.3, 82.6, "waredb.com processor table; gigagpu.com for float32 accumulation")
_gpu("rtx5090", 32607 / 1024, 1792, 209.5, 419, 104.8, f"{_SHEET}, float32 accumulation; {_SMI}")
_gpu("rtxpro6000", 97887 / 1024, 1792, 503.8, 1007.6, 126, f"{_SHEET}; {_SMI}")
_gpu("mi300x", 192, 5300, 1307, 2615, None, _BOOK)
_gpu("mi325x", 256, 6000, 1307.4, 2614.9, None, _AMD)
_gpu("mi355x", 288, 8000, 2516.6, 5033.2, None, _AMD)


def _apple(name: str, gib: float, gb_s: float) -> None:
    source = "Apple's technical specifications, largest memory, quoted without a copy at hand; no peak is published"
    DEVICES.register(name, DeviceSpec(name, round(gib * GIB), gb_s * 1e9, source=source))


_apple("m1-max", 64, 400)
_apple("m2-ultra", 192, 800)
_apple("m3-max", 128, 400)
_apple("m3-ultra", 512, 819)
_apple("m4-pro", 64, 273)
_apple("m4-max", 128, 546)


def host_memory() -> int | None:
    """Return the physical memory of this machine in bytes, None where the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def find_device(text: str, probed: DeviceSpec | None = None) -> DeviceSpec:
    """Return the device that `text` names: a row of the table, `cpu`, `cpu:64GiB`, or a row with other memory.

    An unknown name with a memory (`mine:32GiB`) is a device of unknown speed, unless it resembles a known name. `cpu`
    is this machine; its speed is known only when it was `probed`. Raises `InvalidInputError` with the nearest name.
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
        hint = nearest(name, known) or nearest(re.sub("[-_ ]", "", name), known)
        if hint or not colon or not name:
            raise InvalidInputError(f"unknown device {text!r}{hint}; known: {', '.join(known)}, or NAME:32GiB")
        device = DeviceSpec(name, None, source="a device of its own")
    if not colon:
        return device
    memory = parse_bytes(size)
    if memory < 1:
        raise InvalidInputError(f"device {text!r} has no memory; write e.g. cpu:64GiB")
    return replace(device, name=f"{name}:{size}", memory_bytes=memory, source=f"{device.source}; memory as given")
