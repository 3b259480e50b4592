"""Measured times per token, compared with the planner's lower bounds, in one run.

Regime: greedy generation on the CPU kernels, one sequence and `--batch` of them at once, at several contexts. Decode is
bound by reading the weights and every sequence's own keys and values once a step, prefill by arithmetic. Bounds
are those of `kvloom.plan` with the best bandwidth and peak of all probes of this run: nothing may be faster. Where
memory is shared with other machines its rate changes within seconds. So a probe runs between any two repeats, and each
repeat is also compared with the bound at the better of its two neighbouring probes ("then").
Every sequence has blocks of its own; the prefix cache only saves computing the same prompts again. A case is measured
in `--repeats` runs of `--new` steps each; medians with the spread. The last line is one JSON object.

    python benchmarks/roofline.py [--model PATH.gguf] [--contexts 512 4096 8000] [--batch 8] [--new 16] [--repeats 5]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
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

SCHEMA_VERSION = 2


class Probes:
    """Bandwidth and peaks of this run; probes are few and short, and stand between the measurements."""

    def __init__(self) -> None:
        self.bandwidths: list[float] = []
        self.peaks: dict[str, list[float]] = {}

    def take_peaks(self) -> None:
        """Measure products once more."""
        for name, peak in best_peaks(rounds=2).items():
            self.peaks.setdefault(name, []).append(peak)

    def between(self, measure: Callable[[], float], repeats: int) -> list[tuple[float, float]]:
        """Return `repeats` results of `measure`, each with the better bandwidth of the probes before and after it."""
        before, found = best_bandwidth(rounds=3), []
        self.bandwidths.append(before)
        for _ in range(repeats):
            seconds, after = measure(), best_bandwidth(rounds=3)
            found.append((seconds, max(before, after)))
            self.bandwidths.append(after)
            before = after
        return found

    def device(self, bandwidth: float | None = None) -> DeviceSpec:
        """Return this machine at its best, or with another bandwidth."""
        peaks = tuple((name, max(values)) for name, values in self.peaks.items())
        return DeviceSpec("cpu", None, bandwidth or max(self.bandwidths), peaks, "cpu", measured=True)


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
    probes.take_peaks()
    for context in options.contexts:
        prompts = [tokens(context) for _ in range(options.batch)]
        for batch in dict.fromkeys((1, options.batch)):
            chosen = prompts[:batch]
            decode_times(llm, chosen, 2)  # computes the prompts, and warms up

            def mean_step(chosen: list[list[int]] = chosen) -> float:
                return statistics.mean(decode_times(llm, chosen, options.new))

            cases.append((context, batch, probes.between(mean_step, options.repeats)))
    for length in options.prompts:
        prefill_time(llm, tokens(length))
        prefills.append((length, probes.between(lambda n=length: prefill_time(llm, tokens(n)), options.repeats)))
    probes.take_peaks()

    device, spec = probes.device(), find_model(str(path))
    rates = spread(probes.bandwidths)
    print(f"{path.name}, {options.dtype}, {options.threads} threads; memory is read at "
          f"{rates['median'] / 1e9:.1f} GB/s ({rates['min'] / 1e9:.1f}-{rates['max'] / 1e9:.1f}), "
          f"products at best {(device.peak(options.dtype) or 0) / 1e9:.0f} GFLOP/s\n")  # fmt: skip
    print(f"{'case':20}{'bound':>10}{'measured, median (spread)':>36}{'measured/bound':>16}{'then':>8}{'GB/s':>8}")
    rows = []

    def show(name: str, bound: Callable[[DeviceSpec], float], times: list[tuple[float, float]], moved: float,
             facts: dict[str, int]) -> None:  # fmt: skip
        found, best = spread([seconds for seconds, _ in times]), bound(device)
        then = spread([seconds / bound(probes.device(bandwidth)) for seconds, bandwidth in times])
        text = f"{found['median'] * 1e3:.2f} ms ({found['min'] * 1e3:.2f}-{found['max'] * 1e3:.2f})"
        print(f"{name:20}{best * 1e3:>7.2f} ms{text:>36}{found['median'] / best:>16.2f}{then['median']:>8.2f}"
              f"{moved / found['median'] / 1e9:>8.1f}")  # fmt: skip
        rows.append({"case": name, **facts, "bound_s": best, "measured_s": found, "ratio": found["median"] / best,
                     "least_ratio": found["min"] / best, "ratio_then": then})  # fmt: skip

    for context, batch, times in cases:

        def decode_roof(device: DeviceSpec, context: int = context, batch: int = batch) -> Roofline:
            # the prompt's first token is generated before the first timed step
            return Roofline(Question(spec, device, context, options.new + 1, batch, dtype=options.dtype))

        roof = decode_roof(device)
        moved = roof.reads.weight_bytes(batch) + batch * roof.reads.kv_read_bytes(context, options.new // 2)
        show(f"decode, {context} x {batch}", lambda d, of=decode_roof: of(d).tpot().value or 0.0, times, moved,
             {"context": context, "batch": batch})  # fmt: skip
    for length, times in prefills:

        def prefill_roof(device: DeviceSpec, length: int = length) -> Roofline:
            return Roofline(Question(spec, device, length, 1, dtype=options.dtype))

        show(f"prefill, {length}", lambda d, of=prefill_roof: of(d).ttft().value or 0.0, times,
             prefill_roof(device).reads.weight_bytes(1), {"prompt": length})  # fmt: skip
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
