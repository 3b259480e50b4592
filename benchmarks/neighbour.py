"""Decode and prefill while another process wants a core.

Regime: greedy generation of one sequence on the CPU kernels, alone and beside a process that computes without end,
pinned to the last core or left to the scheduler. Metric: tokens per second, those of a decode over all its steps, so
that stalls count; the worst step beside it. A fair share of a machine with `cores` cores and as many threads is
(cores - 1/2) / cores of the speed alone. Cases take turns in every repetition; medians with the spread; the last line
is one JSON object.

    python benchmarks/neighbour.py [--model PATH.gguf] [--prompt 512] [--new 64] [--repeats 5] [--threads 2]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from kvloom import LLM, SamplingParams
from kvloom.kernels import cpu
from kvloom.models.pull import pull

SCHEMA_VERSION = 1
NEIGHBOUR = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)  # ends with its parent
if sys.argv[1] != "-":
    os.sched_setaffinity(0, [int(sys.argv[1])])
print("here", flush=True)
while True:
    pass
"""


@contextmanager
def neighbour(core: int | None) -> Iterator[None]:
    """Keep a process computing, on `core` or on any."""
    command = [sys.executable, "-c", NEIGHBOUR, "-" if core is None else str(core)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()


def times(llm: LLM, prompt: list[int], new: int) -> tuple[float, list[float]]:
    """Return the seconds of the prompt's step and those of `new` steps after it."""
    params = SamplingParams(temperature=0, max_tokens=new + 1, ignore_eos=True, detokenize=False)
    request = llm.engine.add(prompt, params)
    found = []
    while not request.finished:
        started = time.perf_counter()
        llm.engine.step()
        found.append(time.perf_counter() - started)
    assert len(found) == new + 1
    return found[0], found[1:]


def spread(values: list[float]) -> dict[str, float]:
    """Return median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Run all cases in turn, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    path = options.model or Path(pull("smollm2"))
    llm = LLM(
        path, dtype="bfloat16", backend="cpu", max_model_len=options.prompt + options.new + 2, max_num_seqs=1,
        kv_cache_memory_bytes=256 << 20, enable_prefix_caching=False, max_num_batched_tokens=1 << 14,
    )  # fmt: skip
    prompt = np.random.default_rng(0).integers(100, 40000, options.prompt).tolist()
    last = max(os.sched_getaffinity(0))
    cases = [
        (threads, beside) for beside in ("alone", "on one core", "anywhere") for threads in sorted({options.threads, 1})
    ]
    found: dict[tuple[int, str], dict[str, list[float]]] = {case: {} for case in cases}

    def measure(case: tuple[int, str]) -> None:
        cpu.set_num_threads(case[0])
        times(llm, prompt, 4)  # threads start, caches fill
        prefill, steps = times(llm, prompt, options.new)
        values = {"prefill": options.prompt / prefill, "decode": len(steps) / sum(steps), "worst step": max(steps)}
        for key, value in values.items():
            found[case].setdefault(key, []).append(value)

    torch.set_num_threads(1)
    for _ in range(options.repeats):
        for case in cases:
            if case[1] == "alone":
                measure(case)
            else:
                with neighbour(last if case[1] == "on one core" else None):
                    measure(case)

    print(f"{path.name}, prompt {options.prompt}, {options.new} new tokens, {last + 1} cores; median (least to most)")
    print(f"{'neighbour':14}{'threads':>8}{'prefill, tokens/s':>28}{'decode, tokens/s':>28}{'worst step, ms':>28}")
    for (threads, beside), kinds in found.items():
        cells = []
        for key, digits, unit in (("prefill", 0, 1.0), ("decode", 1, 1.0), ("worst step", 1, 1e3)):
            c = spread([value * unit for value in kinds[key]])
            cells.append(f"{c['median']:.{digits}f} ({c['min']:.{digits}f}-{c['max']:.{digits}f})")
        print(f"{beside:14}{threads:>8}{cells[0]:>28}{cells[1]:>28}{cells[2]:>28}")
    print(
        json.dumps({
            "schema_version": SCHEMA_VERSION, "benchmark": "neighbour", "isa": cpu.isa(),
            "machine": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0)),
            "model": path.name, "prompt": options.prompt, "new": options.new, "seed": 0,
            "cases": [
                {"threads": threads, "neighbour": beside, **{key: spread(values) for key, values in kinds.items()}}
                for (threads, beside), kinds in found.items()
            ],
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
