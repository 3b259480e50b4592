"""`kvloom plan --probe`: bandwidth by the C library, peak of matrix products by torch, kept for later plans."""

import time


def probe() -> str:
    """Measure this machine, keep the figures, and return what to say of them."""
    from kvloom.plan.probe import measure_read_bandwidth, probe_path, save_probe

    bandwidth = measure_read_bandwidth()
    peaks = measure_peaks()
    save_probe(bandwidth, peaks)
    lines = [f"read bandwidth: {bandwidth / 1e9:.1f} GB/s (best of several rounds)"]
    lines += [f"matrix peak, {name}: {peak / 1e9:,.0f} GFLOP/s" for name, peak in peaks.items()]
    return "\n".join([*lines, f"kept in {probe_path()}; `--device cpu` uses them"]) + "\n"


def measure_peaks(size: int = 2048, repeats: int = 7) -> dict[str, float]:
    """Return the best FLOP/s of square matrix products on the CPU by dtype, all threads."""
    import torch

    found: dict[str, float] = {}
    for name in ("bfloat16", "float32"):
        dtype = getattr(torch, name)
        left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        best = 0.0
        for _ in range(repeats + 1):
            began = time.perf_counter()
            torch.mm(left, right)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
        found[name] = best
    return found
