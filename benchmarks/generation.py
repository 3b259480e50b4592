"""Prefill and decode of a whole model, beside transformers, in one run.

Regime: greedy generation on the CPU. Prefill is one prompt of `--prompt` tokens in one piece (bound by arithmetic);
decode follows it token by token, one sequence or `--batch` of them at once (bound by reading the weights once a step,
and the cache). Metric: tokens/s; for decode those of all sequences together. Ceiling of decode: bytes of weights over
the bandwidth at which this machine reads memory, measured in the same run. transformers runs its own forward pass with
its own cache and `sdpa` attention, in a plain greedy loop without the overhead of `generate`. Prefix caching is off.
Systems take turns in every repetition; medians with the spread; the last line is one JSON object.

    python benchmarks/generation.py [--model PATH.gguf] [--prompt 512] [--new 32] [--batch 8] [--repeats 5] [--eager]
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers_cache import continued

from kvloom import LLM, SamplingParams
from kvloom.kernels import cpu
from kvloom.models.pull import pull

SCHEMA_VERSION = 1
Times = tuple[float, float]
"""Seconds of the prefill of all sequences, and of one decode step."""

Run = Callable[[list[list[int]], int], Times]
"""Generates a number of tokens after each of some prompts."""


def kvloom_runner(path: Path, dtype: str, backend: str, length: int) -> tuple[Run, int]:
    """Return a runner of kvloom and the bytes of its weights."""
    llm = LLM(
        path, dtype=dtype, backend=backend, max_model_len=length, kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False, max_num_batched_tokens=1 << 14,
    )  # fmt: skip
    engine = llm.engine

    def run(prompts: list[list[int]], new: int) -> Times:
        params = SamplingParams(temperature=0, max_tokens=new + 1, ignore_eos=True, detokenize=False)
        requests = [engine.add(prompt, params) for prompt in prompts]
        started = time.perf_counter()
        engine.step()
        first = time.perf_counter()
        for _ in range(new):
            engine.step()
        ended = time.perf_counter()
        assert all(request.finished for request in requests)
        return first - started, (ended - first) / new

    return run, engine.runner.model.num_bytes


def transformers_runner(path: Path, dtype: str, length: int) -> tuple[Run, int]:
    """Return a runner of transformers and the bytes of its weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()

    @torch.inference_mode()
    def run(prompts: list[list[int]], new: int) -> Times:
        started = time.perf_counter()
        logits, cache = continued(model, torch.tensor(prompts), logits_to_keep=1)
        token = logits[:, -1].argmax(-1, keepdim=True)
        first = time.perf_counter()
        for _ in range(new):
            logits, cache = continued(model, token, cache)
            token = logits[:, -1].argmax(-1, keepdim=True)
        return first - started, (time.perf_counter() - first) / new

    return run, sum(p.numel() * p.element_size() for p in model.parameters())


def spread(values: list[float]) -> dict[str, float]:
    """Return median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def version(package: str) -> str:
    """Return the installed version of a package."""
    from importlib.metadata import version as installed

    return installed(package)


def commit() -> str:
    """Return the commit of this checkout, marked where files differ from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def main() -> None:
    """Run all systems in turn, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--eager", action="store_true", help="also the backend of kvloom that defines the others")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cpu.set_num_threads(options.threads)
    path = options.model or Path(pull("smollm2"))
    length = options.prompt + options.new + 2
    memory = torch.ones(512 << 20, dtype=torch.uint8)
    bandwidth = [cpu.read_bandwidth(memory) for _ in range(5)]

    systems: dict[str, tuple[Run, int]] = {}
    for dtype in ("float32", "bfloat16"):
        systems[f"kvloom {dtype}"] = kvloom_runner(path, dtype, "cpu", length)
        if options.eager:
            systems[f"kvloom eager {dtype}"] = kvloom_runner(path, dtype, "eager", length)
        systems[f"transformers {dtype}"] = transformers_runner(path, dtype, length)

    rng = np.random.default_rng(0)
    prompts = rng.integers(100, 40000, (options.batch, options.prompt)).tolist()
    found: dict[str, dict[str, list[float]]] = {name: {} for name in systems}
    for repeat in range(options.repeats + 1):  # the first one warms up
        for name, (run, _) in systems.items():
            prefill, step = run(prompts[:1], options.new)
            _, batch_step = run(prompts, options.new)
            if repeat:
                for key, value in (
                    ("prefill", options.prompt / prefill),
                    ("decode", 1 / step),
                    ("decode batch", options.batch / batch_step),
                ):
                    found[name].setdefault(key, []).append(value)

    read = statistics.median(bandwidth)
    print(f"prompt {options.prompt}, {options.new} new tokens, batch {options.batch}, {options.threads} threads")
    print(f"memory is read at {read / 1e9:.1f} GB/s; tokens/s, median (least to most)\n")
    print(f"{'':24}{'prefill':>24}{'decode':>24}{'of ceiling':>12}{f'decode x {options.batch}':>26}")
    for name, (_, num_bytes) in systems.items():
        cells = [spread(values) for values in found[name].values()]
        texts = [f"{c['median']:.1f} ({c['min']:.1f}-{c['max']:.1f})" for c in cells]
        share = cells[1]["median"] * num_bytes / read
        print(f"{name:24}{texts[0]:>24}{texts[1]:>24}{share:>12.0%}{texts[2]:>26}")
    print(
        json.dumps(
            {
                "schema_version": SCHEMA_VERSION,
                "benchmark": "generation",
                "machine": platform.processor() or platform.machine(),
                "threads": options.threads,
                "commit": commit(),
                "seed": 0,
                "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
                "model": path.name,
                "prompt": options.prompt,
                "new": options.new,
                "batch": options.batch,
                "read_bytes_per_second": spread(bandwidth),
                "weight_bytes": {name: num_bytes for name, (_, num_bytes) in systems.items()},
                "tokens_per_second": {
                    name: {key: spread(values) for key, values in kinds.items()} for name, kinds in found.items()
                },
            }
        )
    )


if __name__ == "__main__":
    main()
