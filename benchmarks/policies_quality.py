"""What each cache method costs in quality: divergence from the full cache, and whether a pass key survives.

Regime: prompts of `--context` tokens of real text, half of Moby Dick and half of the State of the Union addresses,
compressed once, when the prompt is complete, to the same share of tokens (`--keep`, on average over lanes); then the
text's own next `--tokens` tokens by forced decode. Metric: KL(full || method) in nats per token, mean over prompts with
a bootstrapped 95 % interval; agreement of the most likely token. The pass key is a number hidden in text of either
kind at even depths; the question follows in the prompt, which helps methods that look at the end of it; share answered
with a bootstrapped interval. Floors: random eviction; ceiling: the full cache against itself (0). The texts were in
every model's training data, so read differences, never absolute values. FastGen has no budget: read its share kept.

Rows are added to `--results` as they come, and those that it has are not run again, so the table may be made in pieces.
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

SCHEMA_VERSION = 2
METHODS = [
    "full", "random", "random(sinks=4)", "window", "streaming", "knorm", "keydiff", "tova", "h2o", "scissorhands",
    "h2o+vatp", "snapkv", "snapkv+adaptive", "snapkv+pyramid", "snapkv+critical", "snapkv(pooling=max,kernel=7)",
    "snapkv(pooling=max,kernel=7)+adaptive", "expected",
    "expected(eps=0.01)+adaptive", "kvzip", "kvzip+uniform", "h2o+cam", "h2o+d2o", "h2o+kvmerger", "fastgen",
]  # fmt: skip
KEY = "The special magic number is {}. Remember it."
ASK = "\n\nQuestion: What is the special magic number?\nAnswer: The special magic number is"


@dataclass
class Task:
    """A prompt with the tokens that follow it, or with the number that it hides."""

    prompt: list[int]
    follow: list[int] | None = None
    number: str = ""


def spelled(method: str, keep: float, prompt: int) -> str | None:
    """Return the policy string of a row of the table; some have no `keep` and get the same number of tokens."""
    name, _, rest = method.partition("+")
    extra = f"+{rest}" if rest else ""
    if name == "full":
        return None
    if name == "fastgen":
        return "fastgen+prefill"
    if name == "window":
        return f"window(size={int(keep * prompt)})+prefill"
    if name == "streaming":
        return f"streaming(sinks=4,window={int(keep * prompt) - 4})+prefill"
    head, _, inner = name.partition("(")
    arguments = ",".join(filter(None, [f"keep={keep}", inner.rstrip(")")]))
    return f"{head}({arguments})+prefill{extra}"


def interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % interval of the mean by the bootstrap, with a fixed seed."""
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def tasks_of(llm: LLM, asked: argparse.Namespace) -> list[Task]:
    """Return the prompts with their continuations, then those that hide a number at depths from 5 % to 95 %."""
    sources = [llm.tokenizer.encode(text(member)[: 3 << 20]) for member in (MOBY_DICK, SOTU)]
    length, rng = asked.context + asked.tokens, random.Random(1)
    tasks = []
    for index in range(asked.prompts):
        words = sources[index % 2]
        at = len(words) // 2 // asked.prompts * index
        tasks.append(Task(words[at : at + asked.context], words[at + asked.context : at + length]))
    ask = llm.tokenizer.encode(ASK)
    for index in range(asked.keys):
        words = sources[index % 2]
        number = str(rng.randrange(10_000, 100_000))
        key = llm.tokenizer.encode(KEY.format(number))
        room = asked.context - len(key) - len(ask)
        first = len(words) // 2 + len(words) // 2 // (asked.keys + 1) * index
        filler, at = words[first : first + room], int((0.05 + 0.9 * index / max(1, asked.keys - 1)) * room)
        tasks.append(Task([*filler[:at], *key, *filler[at:], *ask], number=number))
    return tasks


def measured(
    llm: LLM, tasks: list[Task], policy: str | None, full: dict[tuple[int, int], torch.Tensor]
) -> dict[str, object]:
    """Run all tasks at once under `policy` and compare with the log-probabilities of `full`, which is filled if empty.

    The first token of a continuation comes from the prompt's own forward pass, before anything was evicted.
    """
    fill = not full
    divergence: dict[int, list[float]] = {}
    agreement: dict[int, list[float]] = {}

    def watch(sequences: list, logits: torch.Tensor) -> None:
        for sequence, row in zip(sequences, logits, strict=True):
            index, step = order.index(sequence.request), sequence.num_output_tokens
            if sequence.request.forced_token_ids is None or step == 0:
                continue
            own = torch.log_softmax(row.float(), -1)
            if fill:
                full[index, step] = own.clone()
            reference = full[index, step]
            divergence.setdefault(index, []).append(float((reference.exp() * (reference - own)).sum()))
            agreement.setdefault(index, []).append(float(reference.argmax() == own.argmax()))

    began = time.perf_counter()
    engine, order = llm.engine, []
    engine.observer = watch
    params = SamplingParams(temperature=0, max_tokens=8)
    for task in tasks:
        order.append(engine.add(task.prompt, params, forced_token_ids=task.follow, kv_policy=policy))
    outputs: dict[str, str] = {}
    kept = []
    while engine.has_work:
        engine.step()
    for request in order:
        output = engine.output(request)
        outputs[request.request_id] = output.outputs[0].text
        lanes = engine.cache.spec.num_lanes
        kept.append(1 - output.kv.evicted_tokens / (lanes * len(request.prompt_token_ids)))
        engine.abort(request.request_id)
    engine.observer = None
    hits = [float(t.number in outputs[r.request_id].replace(",", "")) for t, r in zip(tasks, order, strict=True)
            if t.number]  # fmt: skip
    losses = [statistics.fmean(values) for _, values in sorted(divergence.items())]
    (low, high), (key_low, key_high) = interval(losses), interval(hits)
    return {
        "kl": statistics.fmean(losses), "kl_low": low, "kl_high": high, "kl_by_prompt": losses,
        "agreement": statistics.fmean(statistics.fmean(v) for v in agreement.values()),
        "pass_keys": statistics.fmean(hits), "pass_keys_low": key_low, "pass_keys_high": key_high,
        "kept": statistics.fmean(kept), "seconds": time.perf_counter() - began,
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
        tasks = tasks_of(llm, asked)
        full: dict[tuple[int, int], torch.Tensor] = {}
        measured(llm, tasks, None, full)  # also fills the prefix cache, which changes nothing of what is kept
        for method, keep in missing:
            if time.perf_counter() - started > asked.seconds:
                break
            row = {"method": method, "keep": keep, "policy": spelled(method, keep, asked.context)}
            row |= measured(llm, tasks, row["policy"], full)
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
