"""Text without end: perplexity and memory of StreamingLLM's convention over many times the model's context.

Regime: one document by forced decode under `streaming(sinks=S,window=W,positions=cache)`. Metrics: mean negative
log-likelihood at sampled positions, against the same token predicted after a fresh forward pass over the window alone
(recomputation, the method's ceiling: slow, and the same tokens in sight but for the sinks); arena bytes, which must not
grow. Compared with 0 sinks, which the paper finds to fail. The last line is one JSON object.

    python benchmarks/policies_streaming.py [--tokens 20000] [--sinks 4 0] [--window 1000] [--samples 400]
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import time

import torch
from policies_texts import text

from kvloom import LLM, SamplingParams

SCHEMA_VERSION = 1


def streamed(llm: LLM, tokens: list[int], sinks: int, window: int, slack: int) -> tuple[list[float], list[int]]:
    """Return -log p of every token but the first, and the arena's bytes after each step."""
    policy = f"streaming(sinks={sinks},window={window},positions=cache)"
    if slack:
        policy += f"+chunk(tokens=512)+slack(tokens={slack})"
    losses: list[float] = []
    sizes: list[int] = []
    follow = tokens[1:]

    def watch(sequences: object, logits: torch.Tensor) -> None:
        losses.append(-float(torch.log_softmax(logits[0].float(), -1)[follow[len(losses)]]))
        sizes.append(llm.engine.cache.arena.used_bytes)

    llm.engine.observer = watch
    llm.generate(
        {"prompt_token_ids": tokens[:1], "forced_token_ids": follow, "kv_policy": policy},
        SamplingParams(temperature=0, detokenize=False),
    )
    llm.engine.observer = None
    return losses, sizes


def recomputed(llm: LLM, tokens: list[int], at: int, length: int) -> float:
    """Return -log p of token `at` after a fresh pass over the `length` tokens before it."""
    found: list[float] = []
    llm.engine.observer = lambda s, logits: found.append(-float(torch.log_softmax(logits[0].float(), -1)[tokens[at]]))
    prompt = tokens[max(0, at - length) : at]
    llm.generate({"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=1, detokenize=False))
    llm.engine.observer = None
    return found[0]


def main() -> None:
    """Print the table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--sinks", type=int, nargs="+", default=[4, 0])
    parser.add_argument("--window", type=int, default=1000)
    parser.add_argument("--slack", type=int, default=0, help="0 evicts at every step, as the paper does")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--first", type=int, default=2000, help="first position that is sampled")
    asked = parser.parse_args()
    llm = LLM(asked.model, dtype="float32", enable_prefix_caching=False)
    tokens = llm.tokenizer.encode(text()[: asked.tokens * 8])[: asked.tokens]
    first = min(asked.first, asked.tokens // 2)
    places = [first + (len(tokens) - 1 - first) * i // asked.samples for i in range(asked.samples)]
    length = asked.window + max(asked.sinks)
    fresh = [recomputed(llm, tokens, at, length) for at in places]
    ceiling = math.exp(statistics.fmean(fresh))
    print(f"{len(tokens)} tokens, window {asked.window}, {len(places)} positions from {first} on")
    print(f"{'method':24} {'perplexity':>11} {'ratio':>7} {'KV now':>12} {'KV most':>12} {'s':>8}")
    print(f"{'recomputed window':24} {ceiling:11.3f} {1:7.3f}")
    rows = []
    for sinks in asked.sinks:
        began = time.perf_counter()
        losses, sizes = streamed(llm, tokens, sinks, asked.window, asked.slack)
        perplexity = math.exp(statistics.fmean(losses[at - 1] for at in places))
        settled = sizes[first:]
        rows.append({"sinks": sinks, "perplexity": perplexity, "ratio": perplexity / ceiling,
                     "bytes_last": settled[-2], "bytes_most": max(settled),
                     "seconds": time.perf_counter() - began})  # fmt: skip
        print(f"{f'streaming, {sinks} sinks':24} {perplexity:11.3f} {perplexity / ceiling:7.3f} {settled[-2]:12} "
              f"{max(settled):12} {rows[-1]['seconds']:8.1f}")  # fmt: skip
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    print(json.dumps({"schema_version": SCHEMA_VERSION, "benchmark": "policies_streaming", "model": llm.model,
                      "machine": platform.processor() or platform.machine(), "commit": commit,
                      "torch": torch.__version__, "arguments": vars(asked), "recomputed": ceiling,
                      "rows": rows}))  # fmt: skip


if __name__ == "__main__":
    main()
