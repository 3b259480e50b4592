"""What each cache method costs in quality: divergence from the full cache, and whether a pass key survives.

Regime: prompts of real text, compressed when the prompt is complete to the same number of tokens a lane (`--keep`),
then the text's own next tokens by forced decode; nothing is sampled. Metrics: KL(full || method) in nats per token,
mean over prompts with a bootstrapped 95 % interval; agreement of the most likely token; share of pass keys answered.
Floors: random eviction and StreamingLLM; ceiling: the full cache against itself (0). The text was in every model's
training data, so read differences, never absolute values. The question of the pass key is in the prompt, which helps
query-aware methods. The last line is one JSON object.

    python benchmarks/policies_quality.py [--model smollm2] [--keep 0.5 0.25] [--prompts 8] [--context 1024]
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import time

import torch
from policies_texts import text

from kvloom import LLM, SamplingParams

SCHEMA_VERSION = 1
METHODS = [
    "random", "random(sinks=4)", "streaming", "h2o+prefill", "tova+prefill", "scissorhands+prefill", "snapkv",
    "snapkv+adaptive", "snapkv+pyramid", "snapkv+critical", "h2o+prefill+vatp", "knorm", "keydiff", "expected",
    "expected(eps=0.01)+adaptive", "kvzip", "kvzip+uniform", "h2o+prefill+cam", "h2o+prefill+d2o",
    "h2o+prefill+kvmerger",
]  # fmt: skip
KEY = "The special magic number is {}. Remember it."
ASK = "\n\nQuestion: What is the special magic number?\nAnswer: The special magic number is"


def spelled(method: str, keep: float, prompt: int) -> str:
    """Return the policy string of a row of the table; streaming has no `keep` and gets the same number of tokens."""
    name, plus, rest = method.partition("+")
    if name == "streaming":
        return f"streaming(sinks=4,window={max(1, int(keep * prompt) - 4)})+chunk(tokens={prompt})+prefill"
    head, _, inner = name.partition("(")
    arguments = ",".join(filter(None, [f"keep={keep}", inner.rstrip(")")]))
    return f"{head}({arguments}){plus}{rest}"


def forced_logits(llm: LLM, prompt: list[int], follow: list[int], policy: str | None) -> torch.Tensor:
    """Return log-probabilities [n, V] of each token of `follow` after `prompt` under `policy`."""
    rows: list[torch.Tensor] = []
    llm.engine.observer = lambda sequences, logits: rows.append(torch.log_softmax(logits[0].float(), -1))
    request = {"prompt_token_ids": prompt, "forced_token_ids": follow}
    if policy is not None:
        request["kv_policy"] = policy
    llm.generate(request, SamplingParams(temperature=0, detokenize=False), use_tqdm=False)
    llm.engine.observer = None
    return torch.stack(rows)


def interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % interval of the mean by the bootstrap, with a fixed seed."""
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def pass_key_prompts(llm: LLM, words: list[int], count: int, context: int) -> list[tuple[list[int], str]]:
    """Return prompts of about `context` tokens with a number hidden at different depths, and the number."""
    rng = random.Random(1)
    ask, made = llm.tokenizer.encode(ASK), []
    for index in range(count):
        number = str(rng.randrange(10_000, 100_000))
        key = llm.tokenizer.encode(KEY.format(number))
        room = context - len(key) - len(ask)
        filler = words[index * room : (index + 1) * room]
        at = int((0.1 + 0.8 * index / max(1, count - 1)) * room)
        made.append(([*filler[:at], *key, *filler[at:], *ask], number))
    return made


def main() -> None:
    """Print the table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--keys", type=int, default=10)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    asked = parser.parse_args()
    llm = LLM(asked.model, dtype="float32", enable_prefix_caching=False)
    words = llm.tokenizer.encode(text())
    step = max(asked.context + asked.tokens, len(words) // (asked.prompts + 1))
    starts = [step * index for index in range(asked.prompts)]
    pieces = [words[s : s + asked.context + asked.tokens] for s in starts]
    full = [forced_logits(llm, p[: asked.context], p[asked.context :], None) for p in pieces]
    keys = pass_key_prompts(llm, words, asked.keys, asked.context)
    rows = []
    for keep in asked.keep:
        print(f"\nkeep {keep:.0%} of {asked.context} tokens, {asked.prompts} prompts, {asked.keys} pass keys")
        print(f"{'method':32} {'KL (nats/token)':>16} {'95 % interval':>20} {'agree':>7} {'key':>6} {'s':>7}")
        for method in ["full", *asked.methods]:
            began = time.perf_counter()
            policy = None if method == "full" else spelled(method, keep, asked.context)
            divergences, agreements = [], []
            for piece, reference in zip(pieces, full, strict=True):
                own = forced_logits(llm, piece[: asked.context], piece[asked.context :], policy)
                # the first token comes from the prompt's own forward pass, before anything was evicted
                kl = (reference.exp() * (reference - own)).sum(-1)[1:]
                divergences.append(float(kl.mean()))
                agreements.append(float((reference.argmax(-1) == own.argmax(-1))[1:].float().mean()))
            hits = 0
            for prompt, number in keys:
                request = {"prompt_token_ids": prompt} | ({} if policy is None else {"kv_policy": policy})
                answer = llm.generate(request, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)[0]
                hits += number in answer.outputs[0].text.replace(",", "")
            low, high = interval(divergences)
            row = {"method": method, "keep": keep, "kl": statistics.fmean(divergences), "kl_low": low, "kl_high": high,
                   "agreement": statistics.fmean(agreements), "pass_keys": hits / max(1, len(keys)),
                   "seconds": time.perf_counter() - began}  # fmt: skip
            rows.append(row)
            print(f"{method:32} {row['kl']:16.4f} {f'{low:.4f} .. {high:.4f}':>20} {row['agreement']:7.1%} "
                  f"{row['pass_keys']:6.0%} {row['seconds']:7.1f}")  # fmt: skip
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    print(json.dumps({"schema_version": SCHEMA_VERSION, "benchmark": "policies_quality", "model": llm.model,
                      "machine": platform.processor() or platform.machine(), "commit": commit, "seed": 0,
                      "torch": torch.__version__, "arguments": vars(asked), "rows": rows}))  # fmt: skip


if __name__ == "__main__":
    main()
