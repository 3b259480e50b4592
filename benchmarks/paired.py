"""Speed of two source trees, compared in pairs, with a confidence interval of the ratio.

Regime: greedy generation in bfloat16 on the CPU kernels, prefix caching off, of SmolLM2-135M-Instruct and Gemma 3 270M.
Cases: `prefill` (512 random ids, tokens/s to the first token), `decode` (64 tokens after them, one sequence),
`requests` (32 requests of 256 + 64 tokens at once, new tokens/s). Every tree runs every model in a fresh process, the
trees in turn, the first of a pair alternating. Metric: the ratio second / first of each pair, whose two processes run
one after the other; its geometric mean with the 95 % bootstrap interval over pairs. Above 1 the second is faster.
Each tree is a checkout whose `src/kvloom` holds its built extension; both run under this Python. The last line is one
JSON object.

    python benchmarks/paired.py FIRST SECOND [--pairs 30] [--threads 2] [--model NAME=PATH.gguf ...]
"""

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

SCHEMA_VERSION = 1
PROMPT, NEW = 512, 64
REQUESTS, REQUEST_PROMPT = 32, 256
CASES = ("prefill", "decode", "requests")
TREE = Path(__file__).resolve().parents[1]


def ids(length: int, seed: int, vocabulary: int) -> list[int]:
    """Return random token ids, the same in every tree."""
    numbers = random.Random(seed)
    return [numbers.randrange(10, min(vocabulary, 40_000)) for _ in range(length)]


def measure(path: str, threads: int) -> dict[str, float]:
    """Return tokens per second of every case with the kvloom that this process imports."""
    import torch

    from kvloom import LLM, SamplingParams
    from kvloom.kernels import cpu

    torch.set_num_threads(threads)
    cpu.set_num_threads(threads)
    llm = LLM(
        path, dtype="bfloat16", max_model_len=1024, max_num_seqs=REQUESTS, max_num_batched_tokens=8192,
        enable_prefix_caching=False, kv_cache_memory_bytes=1 << 30,
    )  # fmt: skip
    engine = llm.engine
    vocabulary = engine.runner.model.config.vocab_size

    def stamps(prompts: list[list[int]], new: int) -> list[float]:
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        for prompt in prompts:
            engine.add(prompt, params)
        found = [time.perf_counter()]
        while engine.has_work:
            engine.step()
            found.append(time.perf_counter())
        return found

    stamps([ids(64, 0, vocabulary)], 8)
    one = [stamps([ids(PROMPT, seed, vocabulary)], NEW + 1) for seed in (1, 2, 3)]
    many = stamps([ids(REQUEST_PROMPT, 100 + i, vocabulary) for i in range(REQUESTS)], NEW)
    assert all(len(times) == NEW + 2 for times in one), "a prompt took more than one step"
    return {
        "prefill": PROMPT / statistics.median(times[1] - times[0] for times in one),
        "decode": NEW / statistics.median(times[-1] - times[1] for times in one),
        "requests": REQUESTS * NEW / (many[-1] - many[0]),
    }


def run(tree: Path, model: str, threads: int) -> dict[str, float]:
    """Return what `measure` finds in a new process that imports the kvloom of `tree`."""
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", model, "--threads", str(threads)]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tree} failed on {model}:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def models(named: list[str]) -> dict[str, str]:
    """Return the paths of the models by name; without any, SmolLM2 and the Gemma of the tests, fetched on first use."""
    if named:
        return dict(entry.split("=", 1) for entry in named)
    sys.path.insert(0, str(TREE / "tests"))
    from harness.gemma import gemma_gguf
    from kvloom.models.pull import pull

    return {"smollm2": str(pull("smollm2")), "gemma-3-270m": str(gemma_gguf())}


def summary(first: list[float], second: list[float]) -> dict[str, float]:
    """Return the geometric mean of the ratios second / first of each pair and its interval, beside both medians."""
    from kvloom.measure.interval import bootstrap_interval

    logs = [math.log(b / a) for a, b in zip(first, second, strict=True)]
    low, high = bootstrap_interval(logs)
    return {
        "first": statistics.median(first),
        "second": statistics.median(second),
        "ratio": math.exp(statistics.fmean(logs)),
        "low": math.exp(low),
        "high": math.exp(high),
    }


def commit(tree: Path) -> str:
    """Return the commit of a checkout, marked where files differ from it; empty where it is none."""
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    """Run all pairs, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", type=Path, metavar="TREE", help="two checkouts: FIRST and SECOND")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--measure", metavar="PATH", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.threads)))
        return
    if len(options.trees) != 2:
        parser.error("name two checkouts, FIRST and SECOND")
    rows = []
    for name, path in models(options.model).items():
        found: list[list[dict[str, float]]] = [[], []]
        for pair in range(options.pairs):
            for place in (0, 1) if pair % 2 == 0 else (1, 0):
                found[place].append(run(options.trees[place].resolve(), path, options.threads))
        for case in CASES:
            first, second = ([figures[case] for figures in side] for side in found)
            row = summary(first, second)
            rows.append({"model": name, "case": case, **row, "values": [first, second]})
            print(f"{name:14} {case:9} {row['first']:9.1f} -> {row['second']:9.1f} tok/s   "
                  f"ratio {row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})", flush=True)  # fmt: skip
    print(json.dumps({
        "schema_version": SCHEMA_VERSION, "benchmark": "paired", "commits": [commit(tree) for tree in options.trees],
        "pairs": options.pairs, "threads": options.threads, "machine": platform.machine(),
        "python": platform.python_version(), "rows": rows,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
