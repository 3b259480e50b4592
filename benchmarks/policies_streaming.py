"""Streaming: perplexity and memory of StreamingLLM's position rule on a text longer than the model's context.

Regime: Moby Dick by forced decode, token by token, under `streaming(sinks=S,window=W,positions=cache)`. Metrics: mean
negative log-likelihood at sampled positions, against the same token predicted after a fresh forward pass over the
window alone (recomputation, the method's ceiling: slow, with the same tokens except the sinks), with a bootstrapped
95 % interval of the ratio of perplexities; arena bytes and resident memory, which must not grow. Compared with 0 sinks,
which fails in the paper. `--slack 0` evicts at every step, as in the paper; with more, lanes grow by so many tokens
before they are compacted.

Finished parts are written to `--results` and not run again. The last line is one JSON object.

    python benchmarks/policies_streaming.py --results streaming.jsonl [--tokens 20000] [--sinks 4 0] [--slack 64]
"""

import argparse
import json
import math
import platform
import random
import statistics
import subprocess
import time
from pathlib import Path

import torch
from policies_texts import text

from kvloom import LLM, SamplingParams

SCHEMA_VERSION = 2


def resident_bytes() -> int:
    """Return the memory that this process has in RAM."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def streamed(llm: LLM, tokens: list[int], sinks: int, window: int, slack: int) -> dict[str, list[float]]:
    """Return -log p of every token but the first, and arena and resident bytes after each step."""
    policy = f"streaming(sinks={sinks},window={window},positions=cache)"
    if slack:
        policy += f"+chunk(tokens=512)+slack(tokens={slack})"
    found: dict[str, list[float]] = {"losses": [], "arena": [], "resident": []}
    follow = tokens[1:]

    def watch(sequences: object, logits: torch.Tensor) -> None:
        losses = found["losses"]
        losses.append(-float(torch.log_softmax(logits[0].float(), -1)[follow[len(losses)]]))
        found["arena"].append(llm.engine.cache.arena.used_bytes)
        found["resident"].append(resident_bytes())

    llm.engine.continuation.observer = watch
    llm.generate(
        {"prompt_token_ids": tokens[:1], "forced_token_ids": follow, "kv_policy": policy},
        SamplingParams(temperature=0, detokenize=False),
    )
    llm.engine.continuation.observer = None
    return found


def recomputed(llm: LLM, tokens: list[int], places: list[int], length: int) -> list[float]:
    """Return -log p of the tokens at `places`, each after a fresh pass over the `length` tokens before it."""
    found: list[float] = []
    for at in places:
        llm.engine.continuation.observer = lambda s, logits, at=at: found.append(
            -float(torch.log_softmax(logits[0].float(), -1)[tokens[at]])
        )
        prompt = tokens[max(0, at - length) : at]
        llm.generate({"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=1, detokenize=False))
    llm.engine.continuation.observer = None
    return found


def ratio_interval(own: list[float], ceiling: list[float], draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % interval of the ratio of perplexities, by the bootstrap over positions, with a fixed seed."""
    rng = random.Random(0)
    gaps = [a - b for a, b in zip(own, ceiling, strict=True)]
    ratios = sorted(math.exp(statistics.fmean(rng.choices(gaps, k=len(gaps)))) for _ in range(draws))
    return ratios[int(0.025 * draws)], ratios[int(0.975 * draws)]


def main() -> None:
    """Run what is missing, print the table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--sinks", type=int, nargs="+", default=[4, 0])
    parser.add_argument("--window", type=int, default=1000)
    parser.add_argument("--slack", type=int, default=64, help="0 evicts at every step, as the paper does")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--first", type=int, default=2000, help="first position that is sampled")
    parser.add_argument("--results", type=Path, required=True, help="file with one JSON object a part")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further part after so long")
    asked = parser.parse_args()
    parts: dict[str, dict] = {}
    if asked.results.is_file():
        parts = {p["part"]: p for p in map(json.loads, asked.results.read_text(encoding="utf-8").splitlines())}
    llm = LLM(asked.model, dtype=asked.dtype, enable_prefix_caching=False, kv_cache_memory_bytes=256 << 20)
    tokens = llm.tokenizer.encode(text()[: asked.tokens * 8])[: asked.tokens]
    first = min(asked.first, asked.tokens // 2)
    places = [first + (len(tokens) - 1 - first) * i // asked.samples for i in range(asked.samples)]
    length = asked.window + max(asked.sinks)
    pieces = 4  # a fresh pass for each position takes longest: a quarter of them at a time
    names = [f"streaming, {sinks} sinks" for sinks in asked.sinks] + [f"recomputed {i}" for i in range(pieces)]
    started = time.perf_counter()
    for number, name in enumerate(names):
        if name in parts or time.perf_counter() - started > asked.seconds:
            continue
        began = time.perf_counter()
        part: dict[str, object] = {"part": name}
        if name.startswith("recomputed"):
            part["losses"] = recomputed(llm, tokens, places[number - len(asked.sinks) :: pieces], length)
        else:
            found = streamed(llm, tokens, asked.sinks[number], asked.window, asked.slack)
            settled, resident = found["arena"][first:-1], found["resident"]
            part |= {"losses": [found["losses"][at - 1] for at in places], "bytes_least": min(settled),
                     "bytes_most": max(settled), "resident_growth": resident[-1] - resident[first]}  # fmt: skip
        part["seconds"] = time.perf_counter() - began
        parts[name] = part
        with asked.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(part) + "\n")
        print(f"{name}: {part['seconds']:.1f} s", flush=True)
    if any(name not in parts for name in names):
        print("unfinished: run again with the same --results")
        return
    fresh: list[float] = [0.0] * len(places)
    for piece in range(pieces):
        fresh[piece::pieces] = parts[f"recomputed {piece}"]["losses"]
    ceiling = math.exp(statistics.fmean(fresh))
    print(f"\n{len(tokens)} tokens, window {asked.window}, slack {asked.slack}, {len(places)} positions from {first}")
    print(f"{'method':22} {'perplexity':>11} {'ratio':>7} {'95 % interval':>16} {'KV MiB':>15} {'RSS grows':>10} "
          f"{'s':>7}")  # fmt: skip
    print(f"{'recomputed window':22} {ceiling:11.3f} {1:7.3f}")
    rows = []
    for name in names[: len(asked.sinks)]:
        part = parts[name]
        perplexity = math.exp(statistics.fmean(part["losses"]))
        low, high = ratio_interval(part["losses"], fresh)
        rows.append({k: v for k, v in part.items() if k != "losses"}
                    | {"perplexity": perplexity, "ratio": perplexity / ceiling, "low": low, "high": high})  # fmt: skip
        span = f"{part['bytes_least'] / 2**20:.1f} .. {part['bytes_most'] / 2**20:.1f}"
        print(f"{name:22} {perplexity:11.3f} {perplexity / ceiling:7.3f} {f'{low:.3f} .. {high:.3f}':>16} {span:>15} "
              f"{part['resident_growth'] / 2**20:6.1f} MiB {part['seconds']:7.1f}")  # fmt: skip
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    print(json.dumps({"schema_version": SCHEMA_VERSION, "benchmark": "policies_streaming", "model": llm.model,
                      "machine": platform.processor() or platform.machine(), "commit": commit, "seed": 0,
                      "torch": torch.__version__, "arguments": vars(asked) | {"results": str(asked.results)},
                      "recomputed": ceiling, "rows": rows}))  # fmt: skip


if __name__ == "__main__":
    main()
