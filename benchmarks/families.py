"""Families beside transformers on random weights of a given shape: bf16, two threads, one process, taking turns.

Regime: a model of 200 to 500 MB, batch of one. Prefill of 1,024 tokens is bound by arithmetic; decode behind them by
the bytes of the weights (of experts, those that a token chose) over the read rate of the memory, which is its ceiling.
Metric: tokens per second, of prefill 1,024 over the time to the first token, of decode the tokens over the time from
the first to the last. Each round runs both engines on each shape, in alternating order; the table gives medians, lowest
and highest, and the median of the paired ratios. CPU seconds are those of all threads. Their ratio is more reliable
where other processes use the cores. The last line is JSON.

    python benchmarks/families.py --shapes gpt_neox gpt2 --rounds 5
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from transformers_cache import continued

from kvloom.attention.batch import AttentionBatch
from kvloom.cache.kvcache import KVCache
from kvloom.models.checkpoint import open_checkpoint
from kvloom.models.loader import load_model
from kvloom.models.model import StepWanted

SCHEMA_VERSION = 1
PROMPT, NEW, THREADS, SEED = 1024, 48, 2, 0
BLOCK = 16
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox": ("GPTNeoX", {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12,
                             "num_attention_heads": 16, "vocab_size": 32000, "max_position_embeddings": 2048}),
    "gpt2": ("GPT2", {"n_embd": 1024, "n_layer": 16, "n_head": 16, "n_positions": 2048, "vocab_size": 32000,
                      "bos_token_id": 0, "eos_token_id": 0}),
    "mixtral": ("Mixtral", {"hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 6,
                            "num_attention_heads": 12, "num_key_value_heads": 4, "num_local_experts": 8,
                            "num_experts_per_tok": 2, "vocab_size": 32000, "max_position_embeddings": 2048}),
    "qwen3_moe": ("Qwen3Moe", {"hidden_size": 768, "moe_intermediate_size": 256, "num_hidden_layers": 5,
                               "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64, "num_experts": 64,
                               "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 32000,
                               "max_position_embeddings": 2048}),
}  # fmt: skip
"""Name -> (class in transformers, what its config has beside the defaults)."""

Clock = tuple[float, float]
Figures = dict[str, Clock]
"""Seconds by the clock and of all threads, of prefill and of decode."""


def now() -> Clock:
    """Return the time of the clock and the CPU time of all threads."""
    return time.perf_counter(), time.process_time()


def since(start: Clock) -> Clock:
    """Return what has passed since `start`."""
    wall, cpu = now()
    return wall - start[0], cpu - start[1]


def oracle_of(shape: str) -> Any:
    """Return the random model of transformers, in bf16."""
    kind, changes = SHAPES[shape]
    torch.manual_seed(SEED)
    name = f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    config = getattr(transformers, f"{kind}Config")(**changes)
    return getattr(transformers, name)(config).to(torch.bfloat16).eval()


def transformers_engine(model: Any) -> Callable[[list[int]], Figures]:
    """Return what times transformers on a prompt."""

    @torch.inference_mode()
    def run(prompt: list[int]) -> Figures:
        start = now()
        logits, cache = continued(model, torch.tensor([prompt]), None, logits_to_keep=1)
        prefill, start = since(start), now()
        for _ in range(NEW):
            ids = logits[:, -1].argmax(-1, keepdim=True)
            logits, cache = continued(model, ids, cache, logits_to_keep=1)
        return {"prefill": prefill, "decode": since(start)}

    return run


def kvloom_engine(folder: str) -> tuple[Callable[[list[int]], Figures], int]:
    """Return what times kvloom on a prompt, and the bytes of its weights."""
    model = load_model(open_checkpoint(folder), torch.bfloat16, block_size=BLOCK, backend="cpu")
    spec = model.config.kv_spec(BLOCK, "bf16")
    room = spec.request_bytes(PROMPT + NEW) + (16 << 20)
    cache = KVCache(spec, room, 2, torch.bfloat16, layout=model.layout)
    model.prepare(PROMPT)

    def step(sequence: int, ids: list[int]) -> int:
        at, count = int(cache.lanes.seen[sequence]), len(ids)
        assert cache.lanes.extend(sequence, count)
        batch = AttentionBatch(
            token_ids=np.array(ids, np.int32),
            positions=np.arange(at, at + count, dtype=np.int32),
            sequences=np.array([sequence], np.int32),
            cu_seqlens_q=np.array([0, count], np.int32),
        )
        return model.step(batch, cache, StepWanted(np.array([count - 1], np.int32), logits=False)).greedy[0]

    def run(prompt: list[int]) -> Figures:
        sequence, start = cache.lanes.open(), now()
        token = step(sequence, prompt)
        prefill, start = since(start), now()
        for _ in range(NEW):
            token = step(sequence, [token])
        decode = since(start)
        cache.lanes.close(sequence)
        return {"prefill": prefill, "decode": decode}

    return run, model.num_bytes


def timed(shape: str, rounds: int) -> dict[str, Any]:
    """Return the figures of both engines on a shape: seconds of each round, the first of which warms up."""
    oracle = oracle_of(shape)
    with tempfile.TemporaryDirectory() as folder:
        oracle.save_pretrained(folder)
        kvloom, num_bytes = kvloom_engine(folder)
    engines = {"kvloom": kvloom, "transformers": transformers_engine(oracle)}
    prompt = np.random.default_rng(SEED).integers(0, oracle.config.vocab_size, PROMPT).tolist()
    seconds: dict[str, list[Figures]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name in list(engines) if number % 2 else list(engines)[::-1]:
            figures = engines[name](prompt)
            if number:
                seconds[name].append(figures)
    return {"shape": shape, "weight_bytes": num_bytes, "seconds": seconds}


def show(found: dict[str, Any]) -> None:
    """Print the rows of one shape."""
    print(f"{found['shape']}: {found['weight_bytes'] / 1e6:.0f} MB of weights")
    for what, tokens in (("prefill", PROMPT), ("decode", NEW)):
        for name, rounds in found["seconds"].items():
            speeds = [tokens / figures[what][0] for figures in rounds]
            low, middle, high = min(speeds), statistics.median(speeds), max(speeds)
            print(f"  {what:8} {name:13} {middle:9.1f} tok/s ({low:.1f} to {high:.1f})")
        pairs = list(zip(*found["seconds"].values(), strict=True))
        ratios = [statistics.median(theirs[what][i] / ours[what][i] for ours, theirs in pairs) for i in (0, 1)]
        print(f"  {what:8} kvloom over transformers: {ratios[0]:.2f} by the clock, {ratios[1]:.2f} by CPU seconds")


def main() -> None:
    """Time the shapes that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    rows = [timed(shape, options.rounds) for shape in options.shapes]
    for row in rows:
        show(row)
    facts = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__,
             "transformers": transformers.__version__, "seed": SEED, "threads": THREADS}  # fmt: skip
    print(json.dumps({"schema_version": SCHEMA_VERSION, **facts, "prompt": PROMPT, "new": NEW, "rows": rows}))


if __name__ == "__main__":
    main()
