"""Time of each cache method at prefill and at decode, relative to the full cache, in one process.

Regime: one request at a time; a prompt of `--context` tokens of Moby Dick in chunks of the engine's default size, then
greedy decode. All methods share one packed model; each has an engine and an arena of its own. Prefills take turns;
afterwards every engine holds its finished prompt, and the engines decode in turns of `--steps` steps, so that all run
under the same conditions. Ceiling of decode: with B bytes of weights and F or C bytes of full or compressed cache read
a step, (B + F) / (B + C) times the full cache's rate.

Columns: seconds of prefill; the scorer's share of them (passing queries to the policy, scoring and compaction);
prefill relative to that of the full cache; decode tokens/s; bytes held after the prompt; answer length from which the
whole request is faster than with the full cache ("never" when it is not at any length), or up to which, where prefill
is faster and decode slower.
Medians over rounds with least and most; a method that is not faster within `--answer` tokens is marked with "!". The
last line is one JSON object.

    python benchmarks/policies_speed.py [--quantization int8] [--context 8000] [--budget 1024] [--methods ...]
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
from policies_texts import text

from kvloom import LLM, SamplingParams
from kvloom.cache.kvcache import KVCache
from kvloom.engine.engine import Engine
from kvloom.engine.request import Request
from kvloom.engine.runner import Runner
from kvloom.engine.scheduler import Scheduler
from kvloom.kernels import cpu
from kvloom.policies.reading import read_policy

SCHEMA_VERSION = 1
METHODS = [
    "full", "streaming(sinks=4,window={window})", "random(budget={budget})", "knorm(budget={budget},skip_layers=0)",
    "keydiff(budget={budget})", "tova(budget={budget})+prefill", "tova(budget={budget})",
    "snapkv(budget={budget})", "snapkv(budget={budget})+adaptive", "snapkv(budget={budget})+pyramid",
    "snapkv(budget={budget})+critical", "scissorhands(budget={budget})+prefill", "h2o(budget={budget})+prefill",
    "h2o(budget={budget})+prefill+slack", "h2o(budget={budget})", "h2o(budget={budget})+prefill+vatp",
    "h2o(budget={budget})+prefill+cam", "h2o(budget={budget})+prefill+d2o", "h2o(budget={budget})+prefill+kvmerger",
    "expected(budget={budget})", "expected(budget={budget},eps=0.01)+adaptive", "fastgen",
    "kvzip(budget={budget},chunk=128)",  # a longer chunk would leave the model's length after 8,000 tokens
]  # fmt: skip


class Contestant:
    """One method with an engine of its own over a model that all share."""

    def __init__(self, llm: LLM, policy: str, tokens: int) -> None:
        first = llm.engine
        spec, chunk = first.cache.spec, first.scheduler.max_num_batched_tokens
        num_bytes = spec.request_bytes(2 * tokens, chunk)
        cache = KVCache(spec, num_bytes, 3, getattr(torch, llm.dtype), layout=first.runner.model.layout)
        scheduler = Scheduler(cache.lanes, max_num_seqs=2, max_num_batched_tokens=chunk, enable_prefix_caching=False)
        self.policy = policy
        self.engine = Engine(
            Runner(first.runner.model, cache), scheduler, llm.tokenizer, max_model_len=first.admission.max_position,
            max_position=first.admission.max_position, eos_token_ids=(), kv_policy=read_policy(policy),
        )  # fmt: skip
        self.scoring = 0.0
        for owner, name in ((self.engine.evictions, "evict"), (self.engine.runner, "observe")):
            setattr(owner, name, self._timed(getattr(owner, name)))
        self.request: Request | None = None
        self.prefills: list[float] = []
        self.shares: list[float] = []
        self.steps: list[float] = []
        self.held = 0

    def _timed(self, function):
        def call(*arguments):
            started = time.perf_counter()
            function(*arguments)
            self.scoring += time.perf_counter() - started

        return call

    def prefill(self, prompt: list[int], answer: int) -> None:
        """Start again from the prompt, and note how long it takes to its first token."""
        if self.request is not None:
            self.engine.abort(self.request.request_id)
        params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False)
        self.request, self.scoring = self.engine.add(prompt, params), 0.0
        started = time.perf_counter()
        while self.request.sequences[0].num_output_tokens == 0:
            self.engine.step()
        self.prefills.append(time.perf_counter() - started)
        self.shares.append(self.scoring / self.prefills[-1])
        self.held = self.engine.cache.bytes_in_use

    def decode(self, steps: int) -> None:
        """Generate `steps` tokens and note the seconds of each."""
        started = time.perf_counter()
        for _ in range(steps):
            self.engine.step()
        self.steps.append((time.perf_counter() - started) / steps)


def spread(values: list[float]) -> dict[str, float]:
    """Return median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Print the table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--quantization", default=None)
    parser.add_argument("--context", type=int, default=8000)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="policies; {budget} and {window} are filled in")
    parser.add_argument("--prefills", type=int, default=1, help="rounds of prefill")
    parser.add_argument("--rounds", type=int, default=8, help="turns of decoding")
    parser.add_argument("--steps", type=int, default=8, help="tokens a turn")
    parser.add_argument("--answer", type=int, default=512, help="length of answer within which a method should pay")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--append", type=Path, help="file that the JSON line is added to")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    cpu.set_num_threads(asked.threads)
    llm = LLM(
        asked.model, dtype="bfloat16", backend="cpu", quantization=asked.quantization, kv_cache_memory_bytes=2 << 21,
        max_model_len=16,
    )  # fmt: skip
    llm.engine.admission.max_position = llm.engine.runner.model.config.max_position
    prompt = llm.tokenizer.encode(text()[200_000 : 200_000 + 8 * asked.context])[: asked.context]
    window = asked.budget - 4
    methods = [m.format(budget=asked.budget, window=window) for m in asked.methods]
    if methods[0] != "full":
        methods.insert(0, "full")
    answer = (asked.rounds + 1) * asked.steps + 2
    entrants = [Contestant(llm, method, asked.context + answer) for method in methods]
    entrants[0].prefill(prompt[:512], answer)  # warms up
    entrants[0].prefills.clear()
    entrants[0].shares.clear()
    for _ in range(asked.prefills):
        for entrant in entrants:
            entrant.prefill(prompt, answer)
    for turn in range(asked.rounds + 1):
        for entrant in entrants:
            entrant.decode(asked.steps)
            if turn == 0:
                entrant.steps.clear()  # the first turn, when the caches hold the data of other engines
    rows = report(entrants, llm, asked)
    line = json.dumps({
        "schema_version": SCHEMA_VERSION, "benchmark": "policies_speed", "model": llm.model,
        "machine": platform.processor() or platform.machine(),
        "commit": subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                                 check=False).stdout.strip(),
        "seed": 0, "versions": {"torch": torch.__version__}, "arguments": vars(asked) | {"append": None},
        "weight_bytes": llm.engine.runner.model.num_bytes, "rows": rows,
    })  # fmt: skip
    if asked.append is not None:
        with asked.append.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)


def report(entrants: list[Contestant], llm: LLM, asked: argparse.Namespace) -> list[dict[str, object]]:
    """Print the table and return its rows."""
    full = entrants[0]
    base_prefill, base_step = statistics.median(full.prefills), statistics.median(full.steps)
    weights = llm.engine.runner.model.num_bytes
    print(f"{asked.context} tokens, budget {asked.budget}, {asked.quantization or 'bf16'} weights "
          f"({weights / 1e6:.0f} MB), {asked.threads} threads")  # fmt: skip
    print(f"{'method':40} {'prefill s':>10} {'scorer':>7} {'x full':>7} {'decode tokens/s':>22} {'x full':>7} "
          f"{'bound':>6} {'held MB':>8} {'pays from':>10}")  # fmt: skip
    rows: list[dict[str, object]] = []
    for entrant in entrants:
        prefill, step = statistics.median(entrant.prefills), statistics.median(entrant.steps)
        gain = statistics.median(f / s for f, s in zip(full.steps, entrant.steps, strict=True))
        extra, saved = prefill - base_prefill, base_step - step
        pays: float | None = 0.0 if extra <= 0 <= saved else extra / saved if saved > 0 else math.inf
        pays = None if pays == math.inf else max(0.0, pays)
        bound = (weights + full.held) / (weights + entrant.held)
        late = entrant is not full and (pays is None or pays > asked.answer)
        rates = spread([1 / s for s in entrant.steps])
        name = f"{entrant.policy}{' !' if late else ''}"
        rate = f"{rates['median']:.1f} ({rates['min']:.1f}-{rates['max']:.1f})"
        until = "-" if entrant is full else "never" if pays is None else f"{pays:.0f}"
        if extra < 0 and saved < 0:
            until = f"until {extra / saved:.0f}"
        print(f"{name:40} {prefill:10.2f} {statistics.median(entrant.shares):7.1%} {prefill / base_prefill:7.2f} "
              f"{rate:>22} {gain:7.2f} {bound:6.2f} {entrant.held / 1e6:8.1f} {until:>10}")  # fmt: skip
        rows.append({
            "policy": entrant.policy, "prefill_seconds": spread(entrant.prefills),
            "scorer_share": spread(entrant.shares), "decode_tokens_per_second": rates, "decode_gain": gain,
            "decode_gain_bound": bound, "bytes_held": entrant.held, "pays_from_tokens": pays, "marked": late,
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
