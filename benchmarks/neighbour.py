"""Prefill, decode and every policy while other processes use the cores.

Regime: greedy generation of one sequence on the CPU kernels, alone and beside a process that computes without end,
pinned to the last core or left to the scheduler. Metric: tokens per second, those of a decode over all its steps, so
that stalls count; the worst step beside it. A fair share of a machine with `cores` cores and as many threads is
(cores - 1/2) / cores of the speed alone. Cases take turns in every repetition; medians with the spread; the last line
is one JSON object.

With `--policies`: for each policy the seconds of prompt and `--new` tokens, alone, beside one and beside three such
processes, left to the scheduler. The important column is (beside / alone) over the same quotient of `full`: the part
above 1 is time spent waiting. It is far above 1.5 for a policy whose scores are computed by operations whose threads
wait for one another by spinning, and with `--torch-threads`, which lets torch use all threads in the engine.

    python benchmarks/neighbour.py [--model PATH.gguf] [--prompt 512] [--new 64] [--repeats 5] [--threads 2]
    python benchmarks/neighbour.py --policies [all | POLICY ...] [--torch-threads] [--prompt 512] [--new 8]
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
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch

from kvloom import LLM, SamplingParams
from kvloom.kernels import cpu
from kvloom.models.pull import pull
from kvloom.policies.reading import read_policy

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


def times(llm: LLM, prompt: list[int], new: int, policy: str = "full") -> tuple[float, list[float]]:
    """Return the seconds of the prompt's steps and those of `new` steps after them."""
    params = SamplingParams(temperature=0, max_tokens=new + 1, ignore_eos=True, detokenize=False)
    request = llm.engine.add(prompt, params, kv_policy=read_policy(policy))
    first, found = 0.0, []
    while not request.finished:
        answers = request.sequences[0].num_output_tokens > 0
        started = time.perf_counter()
        llm.engine.step()
        if answers:
            found.append(time.perf_counter() - started)
        else:
            first += time.perf_counter() - started
    assert len(found) == new
    return first, found


POLICIES = [
    "full", "window(size=256)", "streaming(window=252)", "random(keep=0.5)", "knorm(keep=0.5)", "keydiff(keep=0.5)",
    "snapkv(keep=0.5)", "snapkv(keep=0.5,kernel=7,pooling=max)", "snapkv(keep=0.5)+adaptive",
    "snapkv(keep=0.5)+pyramid", "snapkv(keep=0.5)+global",
    "snapkv(keep=0.5)+critical", "snapkv(keep=0.5)+vatp", "snapkv(keep=0.5)+threshold",
    "tova(keep=0.5)", "tova(keep=0.5)+prefill+slack", "h2o(keep=0.5)", "h2o(keep=0.5)+prefill+slack",
    "h2o(keep=0.5)+chunk(tokens=256)", "h2o(keep=0.5)+cam", "h2o(keep=0.5)+d2o", "h2o(keep=0.5)+kvmerger",
    "scissorhands(keep=0.5)", "expected(keep=0.5)", "fastgen", "kvzip(keep=0.5)",
]  # fmt: skip
"""Every method, budget, refinement and action but `duo`, whose pattern is a file; spelled for any prompt."""


def compare_policies(llm: LLM, prompt: list[int], options: argparse.Namespace) -> list[dict[str, object]]:
    """Return for every policy and number of neighbours the seconds of each repetition; policies take turns."""
    asked = POLICIES if options.policies in ([], ["all"]) else list(dict.fromkeys(["full", *options.policies]))
    found: dict[tuple[str, int], list[float]] = {(p, n): [] for p in asked for n in (0, 1, 3)}
    for policy in asked:
        times(llm, prompt, 1, policy)
    for _ in range(options.repeats):
        for count in (0, 1, 3):
            with ExitStack() as beside:
                for _ in range(count):
                    beside.enter_context(neighbour(None))
                for policy in asked:
                    first, rest = times(llm, prompt, options.new, policy)
                    found[policy, count].append(first + sum(rest))
    medians = {case: statistics.median(values) for case, values in found.items()}
    print(f"{'policy':42}{'alone, s':>10}{'beside 1':>10}{'of full':>9}{'beside 3':>10}{'of full':>9}")
    for policy in asked:
        alone, row = medians[policy, 0], f"{policy:42}{medians[policy, 0]:>10.3f}"
        for count in (1, 3):
            own, full = medians[policy, count] / alone, medians["full", count] / medians["full", 0]
            row += f"{medians[policy, count]:>10.3f}{own / full:>9.2f}"
        print(row, flush=True)
    return [{"policy": p, "neighbours": n, "seconds": spread(values)} for (p, n), values in found.items()]


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
    parser.add_argument("--policies", nargs="*", default=None, help="compare policies instead; all of them for `all`")
    parser.add_argument("--torch-threads", action="store_true", help="let torch share its operations among threads")
    options = parser.parse_args()
    path = options.model or Path(pull("smollm2"))
    llm = LLM(
        path, dtype="bfloat16", backend="cpu", max_model_len=2 * options.prompt + options.new + 64, max_num_seqs=2,
        kv_cache_memory_bytes=256 << 20, enable_prefix_caching=False, max_num_batched_tokens=1 << 14,
    )  # fmt: skip
    prompt = np.random.default_rng(0).integers(100, 40000, options.prompt).tolist()
    facts = {
        "schema_version": SCHEMA_VERSION, "isa": cpu.isa(), "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)), "model": path.name, "prompt": options.prompt, "new": options.new,
        "seed": 0,
    }  # fmt: skip
    if options.policies is not None:
        torch.set_num_threads(options.threads)
        cpu.set_num_threads(options.threads)
        llm.engine.runner.model.computes_in_torch = options.torch_threads
        cases = compare_policies(llm, prompt, options)
        print(json.dumps({**facts, "benchmark": "neighbour of policies", "cases": cases, "threads": options.threads,
                          "torch_threads": options.torch_threads}))  # fmt: skip
        return
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
            **facts, "benchmark": "neighbour",
            "cases": [
                {"threads": threads, "neighbour": beside, **{key: spread(values) for key, values in kinds.items()}}
                for (threads, beside), kinds in found.items()
            ],
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
