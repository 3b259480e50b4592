"""Measures the best read bandwidth of this machine with the C library alone, and stores measured figures.

The peak of matrix products and faster ways to read come from the caller, because this package has no kernels.
"""

import ctypes
import json
import mmap
import os
import threading
import time
from pathlib import Path

from kvloom.errors import CheckpointError, InvalidInputError
from kvloom.spec.hardware import DeviceSpec, host_memory
from kvloom.units import MIB

SCHEMA = "kvloom.probe/1"


def measure_read_bandwidth(num_bytes: int = 512 * MIB, threads: int | None = None, repeats: int = 7) -> float:
    """Return the best bytes per second at which all threads together read `num_bytes` that are not in any cache.

    Each thread searches its part for an absent byte (`memchr`, vectorised in every C library), `repeats`
    times; the fastest round counts, because a lower bound needs the best case.
    """
    count = threads or _usable_cores()
    part = max(mmap.PAGESIZE, num_bytes // count // mmap.PAGESIZE * mmap.PAGESIZE)
    search = ctypes.CDLL(None).memchr
    search.restype, search.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    memory = mmap.mmap(-1, part * count)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    page = b"\x01" * MIB
    for offset in range(0, part * count, MIB):
        memory[offset : min(offset + MIB, part * count)] = page[: min(MIB, part * count - offset)]
    anchor = ctypes.c_char.from_buffer(memory)
    start = ctypes.addressof(anchor)
    best = 0.0
    for _ in range(repeats):
        workers = [threading.Thread(target=search, args=(start + i * part, 0, part)) for i in range(count)]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, part * count / (time.perf_counter() - began))
    del anchor
    memory.close()
    return best


def _usable_cores() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(int(asked), cores) if asked.isdigit() and int(asked) > 0 else cores


def probe_path() -> Path:
    """Return the file of the last probe; raises `InvalidInputError` for a user without a home folder."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if root.startswith("~"):
        raise InvalidInputError("there is no home folder for the probe; set XDG_CACHE_HOME to a folder")
    return Path(root) / "kvloom" / "probe.json"


def save_probe(
    bandwidth: float, peaks: dict[str, float], runtime_bytes: int | None = None, path: Path | None = None
) -> DeviceSpec:
    """Write what was measured, bytes/s, FLOP/s by dtype and the bytes of a bare engine, and return it as `cpu`."""
    path = path or probe_path()
    day = time.strftime("%Y-%m-%d")
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"schema": SCHEMA, "bandwidth": bandwidth, "peaks": peaks, "runtime_bytes": runtime_bytes, "as_of": day}
    path.write_text(json.dumps(data) + "\n", encoding="utf-8")
    return _device(bandwidth, peaks, day, runtime_bytes)


def load_probe(path: Path | None = None) -> DeviceSpec | None:
    """Return the device that was probed last, None when none was; raises `CheckpointError` when the file is damaged."""
    try:
        path = path or probe_path()
    except InvalidInputError:
        return None
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']!r}")
        peaks = {str(name): float(peak) for name, peak in data["peaks"].items()}
        runtime = data.get("runtime_bytes")
        return _device(float(data["bandwidth"]), peaks, str(data["as_of"]), None if runtime is None else int(runtime))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not understood ({error}); run `kvloom plan --probe` again") from error


def _device(bandwidth: float, peaks: dict[str, float], day: str, runtime_bytes: int | None) -> DeviceSpec:
    return DeviceSpec("cpu", host_memory(), bandwidth, tuple(peaks.items()), "cpu", "probed on this machine", day, True,
                      runtime_bytes)
