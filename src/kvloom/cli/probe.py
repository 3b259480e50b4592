"""`kvloom plan --probe`: measures the best speeds of this machine and the memory of an engine without a model."""

import importlib.util
import subprocess
import sys
import time

ROUNDS = 7
"""Times that each figure is measured; the best counts, because a lower bound needs the best case."""

PROBED_BYTES = 512 << 20
"""Memory that is read; far more than any cache holds."""


def probe() -> str:
    """Measure this machine, store the figures for later plans, and return the report."""
    from kvloom.plan.probe import probe_path, save_probe
    from kvloom.units import format_bytes

    bandwidth, peaks, runtime = best_bandwidth(), best_peaks(), bare_engine_bytes()
    save_probe(bandwidth, peaks, runtime)
    lines = [f"read bandwidth: {bandwidth / 1e9:.1f} GB/s (best of several rounds)"]
    lines += [f"matrix peak, {name}: {peak / 1e9:,.0f} GFLOP/s" for name, peak in peaks.items()]
    if runtime is not None:
        lines.append(f"a process with the engine and no model: {format_bytes(runtime)}")
    return "\n".join([*lines, f"kept in {probe_path()}; `--device cpu` uses them"]) + "\n"


def best_bandwidth(rounds: int = ROUNDS) -> float:
    """Return the best bytes per second of reading memory, by the C library and, where they are built, the kernels."""
    from kvloom.plan.probe import measure_read_bandwidth

    best = measure_read_bandwidth(PROBED_BYTES, repeats=rounds)
    if kernels_are_built():
        import torch

        from kvloom.kernels import cpu

        memory = torch.ones(PROBED_BYTES, dtype=torch.uint8)
        best = max(best, *(cpu.read_bandwidth(memory) for _ in range(rounds)))
    return best


def best_peaks(size: int = 2048, rounds: int = ROUNDS) -> dict[str, float]:
    """Return the best FLOP/s of products by dtype, all threads: those of torch, and of the kernels' register tiles.

    The latter read from the first-level cache: no product over real matrices is faster.
    """
    import torch

    found: dict[str, float] = {}
    for name in ("bfloat16", "float32"):
        dtype = getattr(torch, name)
        left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        best = 0.0
        for _ in range(rounds + 1):
            began = time.perf_counter()
            torch.mm(left, right)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
        found[name] = best
    if kernels_are_built():
        from kvloom.kernels import cpu

        for name, product in (("bfloat16", "bf16"), ("float32", "fp32")):
            found[name] = max(found[name], *(cpu.peak_flops(product) for _ in range(rounds)))
    return found


def kernels_are_built() -> bool:
    """Return whether the compiled kernels are installed."""
    return importlib.util.find_spec("kvloom.kernels.cpu._ext") is not None


def bare_engine_bytes() -> int | None:
    """Return the peak bytes of a process that has imported the engine and loaded no model; None where not known."""
    program = (
        "import kvloom.engine.llm, kvloom.models.tokenizer\n"
        "try:\n    import kvloom.models.compiled\n"
        "except ImportError:\n    pass\n"
        "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return int(done.stdout) * 1024 if done.returncode == 0 and done.stdout.strip().isdigit() else None
