"""CPU kernels against this machine's own limits, measured in the same run.

Regime: decode attention and products of few rows are bound by memory bandwidth; products of many rows and prefill
attention by arithmetic. Metrics: GB/s = bytes of K and V (or weights) that must be read, over seconds; GFLOP/s = useful
operations over seconds. Ceilings: a plain read of the same arena by the same threads, before and after every case; the
rate of register-tile products from the first-level cache. Decode rotates over at least 512 MiB, so no cache holds the
data. "served" is the layout of blocks after requests have arrived, grown by a token a step and ended until the arena
was filled three times over ("served-long": with prompts of up to 4,096 tokens). "scattered" is the worst case: no two
blocks of a lane are adjacent. Medians of interleaved repetitions with the spread; the last line is one JSON object.

    python benchmarks/kernels.py [--threads 2] [--repeats 7] [--only decode|linear|prefill]
"""

import argparse
import json
import mmap
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable

import numpy as np
import torch

from kvloom.cache.kvcache import KVCache
from kvloom.kernels import cpu
from kvloom.spec.kv import KVSpec, LayerKV
from kvloom.spec.store import GRANULE_BYTES, SLAB_BYTES, STORES

SCHEMA_VERSION = 1
ROTATION_BYTES = 512 << 20
LAYERS = 30  # of lanes as a server has them
SERVED = {"served": 1024, "served-long": 4096}  # longest prompts


def huge_pages(num_bytes: int) -> torch.Tensor:
    """Return `num_bytes` of slab-aligned memory as an arena has it."""
    memory = mmap.mmap(-1, num_bytes + SLAB_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    offset = -whole.data_ptr() % SLAB_BYTES
    return whole[offset : offset + num_bytes]


def scattered(store: str, groups: int, width: int, length: int, block_size: int = 16) -> tuple[cpu.Lanes, int]:
    """Return lanes of enough sequences of `length` tokens to fill the rotation, and how many sequences that are."""
    size = STORES.get(store).block_bytes(block_size, width, width)
    columns = -(-length // block_size)
    sequences = -(-ROTATION_BYTES // (groups * columns * size))
    count = sequences * groups * columns
    arena = huge_pages(count * size)
    # Every byte 0x3c: 0.0115 in bf16, and small in the other stores. Pages of zeros may be read faster than others.
    arena.fill_(0x3C)
    order = np.random.default_rng(0).permutation(count) * (size // GRANULE_BYTES)
    table = np.ascontiguousarray(order.reshape(sequences, groups, columns), dtype=np.int32)
    begin = np.zeros((sequences, groups), np.int32)
    return cpu.Lanes(arena, table, begin, np.full_like(begin, length), block_size, store), sequences


def served(store: str, groups: int, width: int, longest: int) -> tuple[cpu.Lanes, np.ndarray, int]:
    """Return lanes as a server has them after a while, the rows that are in use, and the tokens in them.

    Prompts of 32 to `longest` tokens are added whole, outputs of 16 to 256 one token a step. A sequence for which there
    is no room ends at once.
    """
    spec = KVSpec((LayerKV(groups, width, width),) * LAYERS, 16, store)
    capacity = ROTATION_BYTES + (64 << 20)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[store]
    cache = KVCache(spec, capacity, 512, dtype, layout="cpu")
    cache.memory.bytes.fill_(0x3C)
    lanes, numbers = cache.lanes, random.Random(0)
    left: dict[int, int] = {}  # tokens that a request will still generate
    admitted, full = 0, False
    token_bytes = sum(spec.lane_token_bytes)
    while admitted * token_bytes < 3 * capacity or not full:
        sequence, prompt = lanes.open(), numbers.randint(32, longest)
        full = not lanes.extend(sequence, prompt)
        if not full:
            admitted += prompt
            left[sequence] = numbers.randint(16, 256)
            continue
        lanes.close(sequence)
        for running in list(left):
            left[running] -= 1
            admitted += 1
            if left[running] == 0 or not lanes.extend(running, 1):
                lanes.close(running)
                del left[running]
    rows = np.array(sorted(left), np.int32)
    end = np.ascontiguousarray(lanes.begin + lanes.held, dtype=np.int32)
    return cpu.Lanes(cache.memory.bytes, lanes.table, lanes.begin, end, 16, store), rows, int(lanes.seen[rows].sum())


def seconds(call: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def summary(values: list[float]) -> dict[str, float]:
    """Return median, lowest and highest of `values`."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def decode_case(allocation: str, store: str, heads: int, groups: int, width: int, repeats: int) -> dict[str, object]:
    """Decode attention of one token per sequence over all sequences; bytes read per second beside the read probe."""
    layers = LAYERS if allocation in SERVED else 1  # attended in one call, as if they were one: as many lanes in all
    if allocation in SERVED:
        lanes, rows, tokens = served(store, groups, width, SERVED[allocation])
    else:
        lanes, sequences = scattered(store, groups, width, 2000)
        rows, tokens = np.arange(sequences, dtype=np.int32), 2000 * sequences
    shape = cpu.LayerShape(heads * layers, groups * layers, width, width, 0)
    cu = np.arange(len(rows) + 1, dtype=np.int32)
    q = torch.randn(len(rows), heads * layers, width, dtype=torch.float32 if store == "fp32" else torch.bfloat16)
    num_bytes = groups * layers * STORES.get(store).payload_bytes(tokens, width, width)
    rates, reads, ratios = [], [], []
    for _ in range(repeats + 1):
        before = cpu.read_bandwidth(lanes.arena)
        rate = num_bytes / seconds(lambda: cpu.attention(lanes, shape, cu, rows, q, 0.1))
        read = (before + cpu.read_bandwidth(lanes.arena)) / 2
        rates.append(rate / 1e9)
        reads.append(read / 1e9)
        ratios.append(rate / read)
    return {
        "kind": "decode", "allocation": allocation, "store": store, "heads": heads, "kv_heads": groups, "width": width,
        "tokens": tokens, "sequences": len(rows), "bytes": num_bytes, "gb_per_s": summary(rates[1:]),
        "read_gb_per_s": summary(reads[1:]), "of_bandwidth": summary(ratios[1:]),
    }  # fmt: skip


def linear_case(product: str, rows: int, n: int, k: int, repeats: int) -> dict[str, object]:
    """One product over rotating copies of a weight (few rows) or one copy (many)."""
    source = torch.randn(n, k)
    copies = 1
    weights = [cpu.PackedWeight(source, product)]
    if rows <= 64:
        copies = max(1, min(400, ROTATION_BYTES // weights[0].num_bytes))
        weights += [cpu.PackedWeight(source, product) for _ in range(copies - 1)]
    x = torch.randn(rows, k, dtype=torch.float32 if product == "fp32" else torch.bfloat16)
    out = torch.empty(rows, n, dtype=x.dtype)
    probe = huge_pages(256 << 20)
    probe.fill_(1)
    calls = copies if rows <= 64 else 3
    peak_name = {"fp32": "fp32", "w8a8": "int8"}.get(product, "bf16")
    rates, flops, reads, peaks = [], [], [], []
    for _ in range(repeats + 1):
        reads.append(cpu.read_bandwidth(probe) / 1e9)
        peaks.append(cpu.peak_flops(peak_name) / 1e9)

        def run() -> None:
            for i in range(calls):
                cpu.linear(x, weights[i % copies], out=out)

        elapsed = seconds(run) / calls
        rates.append(weights[0].num_bytes / elapsed / 1e9)
        flops.append(2 * rows * n * k / elapsed / 1e9)
    return {
        "kind": "linear", "product": product, "rows": rows, "n": n, "k": k, "gb_per_s": summary(rates[1:]),
        "gflop_per_s": summary(flops[1:]), "read_gb_per_s": summary(reads[1:]), "peak_gflop_per_s": summary(peaks[1:]),
    }  # fmt: skip


def prefill_case(heads: int, groups: int, width: int, length: int, repeats: int) -> dict[str, object]:
    """Causal attention of a whole prompt; the useful half of the square counts."""
    lanes, _ = scattered("bf16", groups, width, length)
    shape = cpu.LayerShape(heads, groups, width, width, 0)
    rows, cu = np.zeros(1, np.int32), np.array([0, length], np.int32)
    q = torch.randn(length, heads, width).bfloat16()
    work = 4 * width * heads * (length * (length + 1) / 2)
    flops, peaks = [], []
    for _ in range(repeats + 1):
        peaks.append(cpu.peak_flops("bf16") / 1e9)
        flops.append(work / seconds(lambda: cpu.attention(lanes, shape, cu, rows, q, 0.1)) / 1e9)
    return {
        "kind": "prefill", "heads": heads, "kv_heads": groups, "width": width, "length": length,
        "gflop_per_s": summary(flops[1:]), "peak_gflop_per_s": summary(peaks[1:]),
    }  # fmt: skip


def row_of(case: dict[str, object]) -> str:
    """Return one line of the table."""

    def middle(key: str) -> float:
        entry = case[key]
        assert isinstance(entry, dict)
        return float(entry["median"])

    if case["kind"] == "decode":
        name = f"decode {case['allocation']} {case['store']} D {case['width']} H/G {case['heads']}/{case['kv_heads']}"
        return (
            f"{name:44} {middle('gb_per_s'):7.1f} GB/s of {middle('read_gb_per_s'):5.1f} = "
            f"{middle('of_bandwidth'):4.0%}"
        )
    if case["kind"] == "linear":
        name = f"linear {case['product']} {case['rows']} x {case['n']} x {case['k']}"
        return (
            f"{name:44} {middle('gb_per_s'):7.1f} GB/s of {middle('read_gb_per_s'):5.1f}, "
            f"{middle('gflop_per_s'):6.0f} GFLOP/s of {middle('peak_gflop_per_s'):5.0f}"
        )
    name = f"prefill D {case['width']} H/G {case['heads']}/{case['kv_heads']} S {case['length']}"
    return f"{name:44} {middle('gflop_per_s'):7.0f} GFLOP/s of {middle('peak_gflop_per_s'):5.0f}"


def commit() -> str:
    """Return the commit of the working tree, or "unknown" outside one."""
    try:
        call = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def json_line(benchmark: str, threads: int, results: list[dict[str, object]]) -> str:
    """Return the last line of a benchmark of kernels: its results and what they were measured on."""
    return json.dumps({
        "schema_version": SCHEMA_VERSION, "benchmark": benchmark, "isa": cpu.isa(), "threads": threads,
        "machine": platform.processor() or platform.machine(), "commit": commit(), "seed": 0,
        "torch": torch.__version__, "results": results,
    })  # fmt: skip


def main() -> None:
    """Run all cases and print the table and the JSON line."""
    parser = argparse.ArgumentParser(description="CPU kernels against measured bandwidth and peak")
    parser.add_argument("--threads", type=int, default=cpu.num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=("decode", "linear", "prefill"))
    arguments = parser.parse_args()
    cpu.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    cases: list[Callable[[], dict[str, object]]] = []
    repeats = arguments.repeats
    if arguments.only in (None, "decode"):
        shapes = ((4, 4), (9, 3), (8, 2), (8, 1))
        for allocation in SERVED:
            for width in (64, 128):
                for heads, groups in shapes:
                    cases.append(lambda a=(allocation, "bf16", heads, groups, width): decode_case(*a, repeats))
        for store, width in (("bf16", 64), ("bf16", 128), ("bf16", 256), ("int8", 64), ("int8", 128), ("fp32", 64)):
            for heads, groups in shapes:
                cases.append(lambda a=("scattered", store, heads, groups, width): decode_case(*a, repeats))
    if arguments.only in (None, "linear"):
        for product in ("bf16", "int8", "int4", "w8a8", "fp32"):
            for rows in (1, 8, 32, 64, 512, 2048):
                cases.append(lambda a=(product, rows): linear_case(*a, 3072, 576, repeats))
    if arguments.only in (None, "prefill"):
        for heads, groups, width in ((9, 3, 64), (8, 2, 128), (4, 1, 256)):
            for length in (512, 4096):
                cases.append(lambda a=(heads, groups, width, length): prefill_case(*a, repeats))
    print(f"{cpu.isa()}, {arguments.threads} threads, {platform.processor() or platform.machine()}")
    results = []
    for case in cases:
        results.append(case())
        print(row_of(results[-1]), flush=True)
    print(json_line("kernels", arguments.threads, results))


if __name__ == "__main__":
    main()
