"""Quality of each cache method: divergence from the full cache, and retrieval of a pass key.

Regime: prompts of `--context` tokens of real text, half of Moby Dick and half of the State of the Union addresses,
compressed once, when the prompt is complete, to the same share of tokens (`--keep`, on average over lanes); then the
text's own next `--tokens` tokens by forced decode. Metric: KL(full || method) in nats per token, mean over prompts with
a bootstrapped 95 % interval; agreement of the most likely token. The pass key is a number hidden in text of either
kind at even depths; the question is at the end of the prompt, which helps methods that score by the last queries;
share answered with its exact interval. Floor: random eviction; ceiling: the full cache against itself (0). The texts
were in every model's training data, so read differences, never absolute values. FastGen has no budget: read the share
that it kept.

Finished rows are written to `--results` and not run again, so the table may be made in several runs.
The last line is one JSON object.

    python benchmarks/policies_quality.py --results quality.jsonl [--keep 0.5 0.25] [--prompts 16] [--keys 16]
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from policies_texts import MOBY_DICK, SOTU, text

from kvloom import LLM, SamplingParams
from kvloom.measure.forced import Reference, forced_scores
from kvloom.measure.interval import bootstrap_interval, share_interval
from kvloom.measure.policies import at_share
from kvloom.measure.window import Window
from kvloom.spec.policy import FULL, PolicySpec

SCHEMA_VERSION = 2
METHODS = [
    "full", "random", "random(sinks=4)", "window", "streaming", "knorm", "keydiff", "tova", "h2o", "scissorhands",
    "h2o+vatp", "snapkv", "snapkv+adaptive", "snapkv+pyramid", "snapkv+critical", "snapkv(pooling=max,kernel=7)",
    "snapkv(pooling=max,kernel=7)+adaptive", "expected",
    "expected(eps=0.01)+adaptive", "kvzip", "kvzip+uniform", "h2o+cam", "h2o+d2o", "h2o+kvmerger", "fastgen",
]  # fmt: skip
KEY = "The special magic number is {}. Remember it."
ASK = "\n\nQuestion: What is the special magic number?\nAnswer: The special magic number is"


@dataclass(frozen=True)
class Hidden:
    """A prompt with the number that it hides."""

    prompt: list[int]
    number: str


def spelled(method: str, keep: float, prompt: int) -> PolicySpec:
    """Return the policy of a row of the table."""
    name, plus, additions = method.partition("+")
    return FULL if name == "full" else at_share(f"{name}+prefill{plus}{additions}", keep, prompt)


def windows_and_keys(llm: LLM, asked: argparse.Namespace) -> tuple[list[Window], list[Hidden]]:
    """Return prompts with their continuations, and prompts that hide a number at depths from 5 % to 95 %."""
    sources = [llm.tokenizer.encode(text(member)[: 3 << 20]) for member in (MOBY_DICK, SOTU)]
    length, rng = asked.context + asked.tokens, random.Random(1)
    windows, keys = [], []
    for index in range(asked.prompts):
        words = sources[index % 2]
        at = len(words) // 2 // asked.prompts * index
        middle = at + asked.context
        windows.append(Window(tuple(words[at:middle]), tuple(words[middle : at + length])))
    ask = llm.tokenizer.encode(ASK)
    for index in range(asked.keys):
        words = sources[index % 2]
        number = str(rng.randrange(10_000, 100_000))
        key = llm.tokenizer.encode(KEY.format(number))
        room = asked.context - len(key) - len(ask)
        first = len(words) // 2 + len(words) // 2 // (asked.keys + 1) * index
        filler, at = words[first : first + room], int((0.05 + 0.9 * index / max(1, asked.keys - 1)) * room)
        keys.append(Hidden([*filler[:at], *key, *filler[at:], *ask], number))
    return windows, keys


def measured(
    llm: LLM, windows: list[Window], keys: list[Hidden], policy: PolicySpec, full: Reference
) -> dict[str, object]:
    """Run everything under `policy` and compare with the log-probabilities of `full`, which is filled if empty."""
    began = time.perf_counter()
    scores = forced_scores(llm.engine, windows, policy, full)
    assert scores is not None
    prompts = [{"prompt_token_ids": key.prompt, "kv_policy": policy} for key in keys]
    answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    hits = [float(key.number in answer.outputs[0].text.replace(",", ""))
            for key, answer in zip(keys, answers, strict=True)]  # fmt: skip
    losses = [score.kl for score in scores]
    low, high = bootstrap_interval(losses)
    key_low, key_high = share_interval(round(sum(hits)), len(hits))
    evicted = [score.evicted / len(window.prompt) for score, window in zip(scores, windows, strict=True)]
    evicted += [answer.kv.evicted_tokens / len(key.prompt) for key, answer in zip(keys, answers, strict=True)]
    return {
        "kl": statistics.fmean(losses), "kl_low": low, "kl_high": high, "kl_by_prompt": losses,
        "agreement": statistics.fmean(score.agreement for score in scores),
        "pass_keys": statistics.fmean(hits), "pass_keys_low": key_low, "pass_keys_high": key_high,
        "kept": 1 - statistics.fmean(evicted) / llm.engine.cache.spec.num_lanes,
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def main() -> None:
    """Run what is missing, print the table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--keys", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--results", type=Path, required=True, help="file with one JSON object a row; rows are added")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further row after so long")
    asked = parser.parse_args()
    done = []
    if asked.results.is_file():
        done = [json.loads(line) for line in asked.results.read_text(encoding="utf-8").splitlines()]
    missing = [(m, k) for k in asked.keep for m in asked.methods
               if not any(row["method"] == m and row["keep"] == k for row in done)]  # fmt: skip
    started = time.perf_counter()
    if missing:
        count = asked.prompts + asked.keys
        llm = LLM(asked.model, dtype=asked.dtype, kv_cache_memory_bytes=3 << 30, max_num_seqs=count)
        windows, keys = windows_and_keys(llm, asked)
        full: Reference = {}
        measured(llm, windows, keys, FULL, full)  # also fills the prefix cache; the kept tokens do not depend on it
        for method, keep in missing:
            if time.perf_counter() - started > asked.seconds:
                break
            policy = spelled(method, keep, asked.context)
            row = {"method": method, "keep": keep, "policy": str(policy)}
            row |= measured(llm, windows, keys, policy, full)
            done.append(row)
            with asked.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{method} at {keep}: KL {row['kl']:.4f}, {row['seconds']:.1f} s", flush=True)
    for keep in asked.keep:
        print(f"\nkeep {keep:.0%} of {asked.context} tokens, {asked.prompts} prompts, {asked.keys} pass keys")
        print(f"{'method':32} {'KL (nats/token)':>16} {'95 % interval':>20} {'agree':>7} {'key':>5} {'interval':>13} "
              f"{'kept':>6}")  # fmt: skip
        for row in sorted((r for r in done if r["keep"] == keep), key=lambda r: r["kl"]):
            print(f"{row['method']:32} {row['kl']:16.4f} {row['kl_low']:9.4f} .. {row['kl_high']:.4f} "
                  f"{row['agreement']:8.1%} {row['pass_keys']:5.0%} {row['pass_keys_low']:6.0%} .. "
                  f"{row['pass_keys_high']:4.0%} {row['kept']:6.1%}")  # fmt: skip
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    print(json.dumps({"schema_version": SCHEMA_VERSION, "benchmark": "policies_quality", "model": asked.model,
                      "machine": platform.processor() or platform.machine(), "commit": commit, "seed": 0,
                      "torch": torch.__version__, "arguments": vars(asked) | {"results": str(asked.results)},
                      "rows": done}))  # fmt: skip


if __name__ == "__main__":
    main()
