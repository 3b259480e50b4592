"""Measured times per token beside the planner's lower bounds, in one run.

Regime: greedy generation on the CPU kernels, one sequence and `--batch` of them at once, at several contexts. Decode is
bound by reading the weights and every sequence's own keys and values once a step, prefill by arithmetic. Bounds
are those of `kvloom.plan` with the best bandwidth and peak of all probes of this run, which stand between the cases.
Every sequence has blocks of its own; the prefix cache only saves computing the same prompts again. A case is measured
in `--repeats` runs of `--new` steps each; medians with the spread. The last line is one JSON object.

    python benchmarks/roofline.py [--model PATH.gguf] [--contexts 512 4096 8000] [--batch 8] [--new 16] [--repeats 5]
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from kvloom import LLM, SamplingParams
from kvloom.cli.probe import best_bandwidth, best_peaks
from kvloom.kernels import cpu
from kvloom.models.pull import pull
from kvloom.plan.question import Question
from kvloom.plan.roofline import Roofline
from kvloom.plan.source import find_model
from kvloom.spec.hardware import DeviceSpec
from kvloom.units import parse_count

SCHEMA_VERSION = 1


class Probes:
    """Bandwidth and peaks of this run; probes are few and short, and stand between the measurements."""

    def __init__(self) -> None:
        self.bandwidths: list[float] = []
        self.peaks: dict[str, list[float]] = {}

    def take(self) -> None:
        """Measure once more."""
        self.bandwidths.append(best_bandwidth(rounds=3))
        for name, peak in best_peaks(rounds=2).items():
            self.peaks.setdefault(name, []).append(peak)

    def device(self) -> DeviceSpec:
        """Return this machine at its best."""
        peaks = tuple((name, max(values)) for name, values in self.peaks.items())
        return DeviceSpec("cpu", None, max(self.bandwidths), peaks, "cpu", measured=True)


def decode_times(llm: LLM, prompts: list[list[int]], new: int) -> list[float]:
    """Return the seconds of `new` steps in which every prompt gets a token, its prompt being computed before."""
    engine = llm.engine
    params = SamplingParams(temperature=0, max_tokens=new + 2, ignore_eos=True, detokenize=False)
    requests = [engine.add(prompt, params) for prompt in prompts]
    while any(not request.sequences[0].output_token_ids for request in requests):
        engine.step()
    found: list[float] = []
    while len(found) < new and not any(request.finished for request in requests):
        started = time.perf_counter()
        engine.step()
        found.append(time.perf_counter() - started)
    for request in requests:
        engine.abort(request.request_id)
    return found


def prefill_time(llm: LLM, prompt: list[int]) -> float:
    """Return the seconds to the first token of a prompt that has the machine to itself."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    request = llm.engine.add(prompt, params)
    started = time.perf_counter()
    while not request.finished:
        llm.engine.step()
    return time.perf_counter() - started


def spread(values: list[float]) -> dict[str, float]:
    """Return median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Measure all cases in turn, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--contexts", type=parse_count, nargs="+", default=[512, 4096, 8000])
    parser.add_argument("--prompts", type=parse_count, nargs="*", default=[512, 2048], help="lengths of the prefills")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cpu.set_num_threads(options.threads)
    path = options.model or Path(pull("smollm2"))
    longest = max([*options.contexts, *options.prompts]) + options.new + 2
    llm = LLM(
        path, dtype=options.dtype, backend="cpu", max_model_len=longest, max_num_seqs=options.batch,
        kv_cache_memory_bytes=4 << 30,
    )  # fmt: skip
    rng = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return list(map(int, rng.integers(100, 40000, count)))

    probes, cases, prefills = Probes(), [], []
    probes.take()
    for context in options.contexts:
        prompts = [tokens(context) for _ in range(options.batch)]
        for batch in dict.fromkeys((1, options.batch)):
            decode_times(llm, prompts[:batch], 2)  # computes the prompts, and warms up
            probes.take()
            steps = []
            for _ in range(options.repeats):
                steps.append(statistics.mean(decode_times(llm, prompts[:batch], options.new)))
            cases.append((context, batch, steps))
    for length in options.prompts:
        prefill_time(llm, tokens(length))
        prefills.append((length, [prefill_time(llm, tokens(length)) for _ in range(options.repeats)]))
    probes.take()

    device, spec = probes.device(), find_model(str(path))
    reads = ", ".join(f"{bandwidth / 1e9:.1f}" for bandwidth in probes.bandwidths)
    print(f"{path.name}, {options.dtype}, {options.threads} threads; memory is read at {reads} GB/s, "
          f"products at best {(device.peak(options.dtype) or 0) / 1e9:.0f} GFLOP/s\n")  # fmt: skip
    print(f"{'case':28}{'bound':>10}{'measured, median (spread)':>36}{'measured/bound':>16}{'GB/s':>8}")
    rows = []

    def show(name: str, bound: float, measured: list[float], moved: float, facts: dict[str, int]) -> None:
        found = spread(measured)
        text = f"{found['median'] * 1e3:.2f} ms ({found['min'] * 1e3:.2f}-{found['max'] * 1e3:.2f})"
        print(f"{name:28}{bound * 1e3:>7.2f} ms{text:>36}{found['median'] / bound:>16.2f}"
              f"{moved / found['median'] / 1e9:>8.1f}")  # fmt: skip
        rows.append({"case": name, **facts, "bound_s": bound, "measured_s": found, "ratio": found["median"] / bound})

    for context, batch, steps in cases:
        # the prompt's first token is there when the first timed step begins
        asked = Question(spec, device, context, options.new + 1, batch, dtype=options.dtype)
        roof = Roofline(asked)
        bound = roof.tpot().value or 0.0
        moved = roof.weight_bytes(batch) + batch * roof.kv_read_bytes(context, options.new // 2)
        show(f"decode, {context} x {batch}", bound, steps, moved, {"context": context, "batch": batch})
    for length, times in prefills:
        asked = Question(spec, device, length, 1, dtype=options.dtype)
        bound = Roofline(asked).ttft().value or 0.0
        show(f"prefill, {length}", bound, times, Roofline(asked).weight_bytes(1), {"prompt": length})
    print(
        json.dumps(
            {
                "schema_version": SCHEMA_VERSION,
                "benchmark": "roofline",
                "machine": platform.processor() or platform.machine(),
                "threads": options.threads,
                "isa": cpu.isa(),
                "model": path.name,
                "dtype": options.dtype,
                "new": options.new,
                "repeats": options.repeats,
                "seed": 0,
                "read_bytes_per_second": probes.bandwidths,
                "peak_flops": probes.peaks,
                "cases": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
