"""Products with packed weights, compared with those of the libraries in torch, in one run.

Regime: y = x w^T as a layer computes it, weights packed beforehand. Few rows are bound by reading the weights, many by
arithmetic; up to 64 rows each call has a weight that lies in no cache. Shapes of SmolLM2 135M and of a model of 1B.
kvloom's products are compared with oneDNN's with a weight reordered for the number of rows ("onednn": bf16; for w8a8
codes by codes, where only kvloom's time includes quantising the activations), torch's own weight-only kernel (int8),
and the dynamic quantisation of its FBGEMM (w8a8: float32 activations, one scale for all rows). Systems take turns in
every repetition. Metrics: GB/s of a matrix of the weight's size, GFLOP/s, and kvloom's speed over the other's, the
median of the repetitions' ratios. Ceilings are probed between repetitions; the probe of w8a8 is below the rate of its
products, so it is no ceiling. Results are checked against float32 first. The last line is one JSON object.

    python benchmarks/products.py [--threads 2] [--repeats 7] [--products bf16 int8 w8a8] [--model small|large]
"""

import argparse
import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from kernels import huge_pages, json_line, summary
from kvloom.kernels import cpu

ROTATION_BYTES = 256 << 20
SHAPES = {
    "small": {"qkv": (960, 576), "gate_up": (3072, 576), "down": (576, 1536), "lm_head": (49152, 576)},
    "large": {"qkv": (3072, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)},
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 512, 2048)
MANY = 64
"""Rows above which a product reads few bytes for what it computes, and a cached weight changes nothing."""

ERRORS = {"bf16": 0.01, "int8": 0.02, "w8a8": 0.03}
"""Largest error of a product, relative to the norm of the exact one."""

Product = Callable[[torch.Tensor], torch.Tensor]
"""Multiplies activations by one copy of a weight."""

Maker = Callable[[torch.Tensor, int], Product]
"""Packs a float32 weight [N, K] for a number of rows."""


def kvloom_product(name: str) -> Maker:
    """Return what packs a weight for kvloom's product `name`."""

    def make(weight: torch.Tensor, rows: int) -> Product:
        packed = cpu.PackedWeight(weight, name)
        return lambda x: cpu.linear(x, packed)

    return make


def onednn_bf16(weight: torch.Tensor, rows: int) -> Product:
    """Pack a weight for oneDNN in bf16."""
    ops = torch.ops.mkldnn
    packed = ops._reorder_linear_weight(weight.bfloat16(), rows)
    return lambda x: ops._linear_pointwise(x, packed, None, "none", [], "")


def codes_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes of the rows of `x` and their scales, symmetric."""
    scale = x.float().abs().amax(1).clamp_min(1e-12) / 127
    return (x.float() / scale[:, None]).round().to(torch.int8), scale


def torch_int8(weight: torch.Tensor, rows: int) -> Product:
    """Pack a weight for torch's weight-only product of bf16 activations and int8 weights."""
    codes, scale = codes_of(weight)
    low = scale.bfloat16()
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, codes, low)


def onednn_w8a8(weight: torch.Tensor, rows: int) -> Product:
    """Pack a weight for oneDNN's product of codes; the activations' codes are kept, with one scale for all rows."""
    ops = torch.ops.onednn
    codes, scale = codes_of(weight)
    packed = ops.qlinear_prepack(codes, [rows, weight.shape[1]])
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    kept: dict[int, tuple[torch.Tensor, float]] = {}

    def multiply(x: torch.Tensor) -> torch.Tensor:
        if id(x) not in kept:
            step = float(x.abs().max()) / 127
            kept[id(x)] = ((x.float() / step).round() + 128).to(torch.uint8), step
        quantised, step = kept[id(x)]
        return ops.qlinear_pointwise(
            quantised, step, 128, packed, scale, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )  # fmt: skip

    return multiply


def fbgemm_w8a8(weight: torch.Tensor, rows: int) -> Product:
    """Pack a weight for FBGEMM's dynamic quantisation."""
    torch.backends.quantized.engine = "fbgemm"
    codes, scale = codes_of(weight)
    quantised = torch._make_per_channel_quantized_tensor(codes, scale, torch.zeros(len(scale), dtype=torch.int64), 0)
    packed = torch.ops.quantized.linear_prepack(quantised, None)
    kept: dict[int, torch.Tensor] = {}
    # FBGEMM returns float32 for float32; the conversion to bf16 is not timed.
    return lambda x: torch.ops.quantized.linear_dynamic(kept.setdefault(id(x), x.float()), packed, True)


SYSTEMS: dict[str, dict[str, Maker]] = {
    "bf16": {"kvloom": kvloom_product("bf16"), "onednn": onednn_bf16},
    "int8": {"kvloom": kvloom_product("int8"), "torch": torch_int8},
    "w8a8": {"kvloom": kvloom_product("w8a8"), "onednn": onednn_w8a8, "fbgemm": fbgemm_w8a8},
}


def passing(x: torch.Tensor, products: Sequence[Product]) -> float:
    """Return the seconds of a call, over one pass through `products`."""
    begin = time.perf_counter()
    for product in products:
        product(x)
    return (time.perf_counter() - begin) / len(products)


def product_case(
    name: str, layer: str, n: int, k: int, rows: int, probe: torch.Tensor, repeats: int
) -> dict[str, object]:  # fmt: skip
    """Multiply `rows` rows with every system; the speeds of each and of kvloom beside it."""
    weight, x = torch.randn(n, k), torch.randn(rows, k).bfloat16()
    num_bytes = n * k * (2 if name == "bf16" else 1)
    copies = max(1, min(300, ROTATION_BYTES // num_bytes)) if rows <= MANY else 1
    calls = 1 if rows <= MANY else max(1, int(2e10 / (2 * rows * n * k)))
    exact = x.float() @ weight.T
    made: dict[str, list[Product]] = {}
    for system, make in SYSTEMS[name].items():
        products = [make(weight, rows) for _ in range(copies)]
        error = float((products[0](x).float() - exact).norm() / exact.norm())
        assert error < ERRORS[name], f"{system} {name}: error {error:.3f} of {rows} x {n} x {k}"
        made[system] = products * calls
    times: dict[str, list[float]] = {system: [] for system in made}
    reads, peaks = [], []
    for repeat in range(repeats + 1):
        read, peak = cpu.read_bandwidth(probe) / 1e9, cpu.peak_flops("int8" if name == "w8a8" else "bf16") / 1e9
        for system, products in made.items():
            seconds = passing(x, products)
            time.sleep(0.01)  # OpenMP's threads spin for a while after their work and would slow the next system
            if repeat:
                times[system].append(seconds)
        if repeat:
            reads.append(read)
            peaks.append(peak)
    return {
        "product": name, "layer": layer, "rows": rows, "n": n, "k": k,
        "read_gb_per_s": summary(reads), "peak_gflop_per_s": summary(peaks),
        "systems": {
            system: {
                "seconds": summary(values),
                "gb_per_s": num_bytes / statistics.median(values) / 1e9,
                "gflop_per_s": 2 * rows * n * k / statistics.median(values) / 1e9,
                "kvloom_over_it": summary([t / own for t, own in zip(values, times["kvloom"], strict=True)]),
            }
            for system, values in times.items()
        },
    }  # fmt: skip


def line_of(case: dict[str, object]) -> str:
    """Return one line of the table."""
    systems, reads, peaks = case["systems"], case["read_gb_per_s"], case["peak_gflop_per_s"]
    assert isinstance(systems, dict) and isinstance(reads, dict) and isinstance(peaks, dict)
    few = int(str(case["rows"])) <= MANY // 2
    key, limit, unit = ("gb_per_s", reads, "GB/s") if few else ("gflop_per_s", peaks, "GFLOP/s")
    cells = [f"{name} {found[key]:6.1f}" for name, found in systems.items()]
    ratios = [f"{found['kvloom_over_it']['median']:.2f}x {name}" for name, found in systems.items() if name != "kvloom"]
    name = f"{case['product']} {case['layer']} {case['rows']} x {case['n']} x {case['k']}"
    return f"{name:34} {', '.join(cells)} of {limit['median']:.0f} {unit}: {', '.join(ratios)}"


def keep_memory() -> None:
    """Reuse freed memory instead of mapping it anew, so that page faults of outputs are in no measurement."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        library.mallopt(-1, 2_000_000_000)  # M_TRIM_THRESHOLD


def main() -> None:
    """Run all cases and print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=cpu.num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--products", nargs="+", choices=tuple(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--model", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(options.threads)
    cpu.set_num_threads(options.threads)
    torch.manual_seed(0)
    probe = huge_pages(256 << 20)
    probe.fill_(1)
    print(f"{cpu.isa()}, {options.threads} threads, {platform.processor() or platform.machine()}")
    results = []
    for name in options.products:
        for model in options.model:
            for layer, (n, k) in SHAPES[model].items():
                for rows in options.rows:
                    if layer == "lm_head" and rows > MANY:
                        continue  # a step computes one row of logits a sequence
                    results.append(product_case(name, layer, n, k, rows, probe, options.repeats))
                    print(line_of(results[-1]), flush=True)
    print(json_line("products", options.threads, results))


if __name__ == "__main__":
    main()
