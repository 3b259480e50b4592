"""Quality of weights in 8 and 4 bits on real texts.

Windows of Moby Dick and of State of the Union addresses in turn, cut as `kvloom measure` does it: a prompt, then tokens
that are given, each through the decode path. Against the same model unquantised: KL in nats a token, relative loss of
perplexity, share of tokens with the same most likely token; means and 95 % intervals bootstrapped over windows. Texts
were in every model's training data: read differences.

A checkpoint whose weights are already in 4 bits, in the same groups, is quantised without further loss. `--shuffle`
puts hidden units, units of the MLPs and those of the heads' values in a random order. This changes only which weights
share a group, so the loss is then that of a checkpoint that was never quantised.

    python benchmarks/weights_quality.py [--model smollm2] [--shuffle] [--windows 32] [--context 256] [--tokens 64]
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator

import torch
from policies_texts import MOBY_DICK, SOTU, text

from kvloom.cache.kvcache import KVCache
from kvloom.engine.engine import Engine
from kvloom.engine.runner import Runner
from kvloom.engine.scheduler import Scheduler
from kvloom.measure.forced import Reference, forced_scores
from kvloom.measure.interval import bootstrap_interval
from kvloom.measure.window import windows_of
from kvloom.models.checkpoint import Checkpoint, open_checkpoint
from kvloom.models.compiled import CompiledModel
from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.policy import FULL

ARENA_BYTES = 1 << 30
QUANTIZATIONS = (None, "int8", "w8a8", "int4")


def shuffled(config: DecoderConfig, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of the same function with its inner units in another order."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randperm(config.hidden_size, generator=generator)
    inner, width, group = None, config.head_dim, config.num_heads // config.num_kv_heads
    lanes = torch.stack([torch.randperm(width, generator=generator) for _ in range(config.num_kv_heads)])
    offset = torch.arange(config.num_heads)[:, None] * width
    values = (lanes + offset[: config.num_kv_heads]).flatten()
    heads = (lanes.repeat_interleave(group, 0) + offset).flatten()
    for name, tensor in tensors:
        part = name.rpartition(".")[2]
        if part in ("gate", "up", "down") and inner is None:
            inner = torch.randperm(tensor.shape[1 if part == "down" else 0], generator=generator)
        if part in ("embed", "lm_head", "q", "k", "v", "gate", "up"):
            tensor = tensor[:, hidden]
        if part in ("o", "down", "final_norm", "attn_norm", "mlp_norm", "post_attn_norm", "post_mlp_norm", "o_bias"):
            tensor = tensor[hidden]
        if part in ("v", "v_bias"):
            tensor = tensor[values]
        if part in ("gate", "up"):
            tensor = tensor[inner]
        if part in ("o", "down"):
            tensor = tensor[:, heads if part == "o" else inner]
        yield name, tensor.contiguous()


def engine_of(checkpoint: Checkpoint, quantization: str | None, shuffle: bool, length: int) -> Engine:
    """Return an engine in bfloat16 without a prefix cache."""
    config, dtype = checkpoint.config, torch.bfloat16
    tensors = checkpoint.tensors(dtype)
    model = CompiledModel(config, shuffled(config, tensors) if shuffle else tensors, dtype, quantization)
    cache = KVCache(config.kv_spec(16, "bf16"), ARENA_BYTES, 65, dtype, layout=model.layout)
    scheduler = Scheduler(cache.lanes, max_num_seqs=64, max_num_batched_tokens=2048, enable_prefix_caching=False)
    return Engine(Runner(model, cache), scheduler, None, max_model_len=length, eos_token_ids=())


def main() -> None:
    """Print a line for each quantization, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--shuffle", action="store_true")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    asked = parser.parse_args()
    checkpoint = open_checkpoint(asked.model)
    tokenizer = checkpoint.tokenizer()
    texts = [tokenizer.encode(text(member)[:800_000], add_special_tokens=False) for member in (MOBY_DICK, SOTU)]
    windows = windows_of(texts, asked.context, asked.tokens + 1, asked.windows, tokenizer.encode(""))
    reference: Reference = {}
    base: list[float] = []
    rows = []
    for quantization in QUANTIZATIONS:
        engine = engine_of(checkpoint, quantization, asked.shuffle, asked.context + asked.tokens + 2)
        scores = forced_scores(engine, windows, FULL, reference)
        assert scores is not None
        base = base or [score.nll for score in scores]
        kl, more = [score.kl for score in scores], [score.nll - full for score, full in zip(scores, base, strict=True)]
        (kl_low, kl_high), (low, high) = bootstrap_interval(kl), bootstrap_interval(more)
        row = {
            "quantization": quantization, "bytes": engine.runner.model.num_bytes,
            "perplexity": math.exp(statistics.fmean(score.nll for score in scores)),
            "kl": statistics.fmean(kl), "kl_low": kl_low, "kl_high": kl_high,
            "loss": math.expm1(statistics.fmean(more)), "loss_low": math.expm1(low), "loss_high": math.expm1(high),
            "agreement": statistics.fmean(score.agreement for score in scores),
        }  # fmt: skip
        rows.append(row)
        print(f"{quantization or 'bf16':5} {row['bytes'] / 1e6:7.1f} MB  perplexity {row['perplexity']:7.2f}  "
              f"KL {row['kl']:.4f} ({kl_low:.4f}-{kl_high:.4f})  loss {row['loss']:+.2%} ({row['loss_low']:+.2%} to "
              f"{row['loss_high']:+.2%})  same token {row['agreement']:.1%}", flush=True)  # fmt: skip
    print(json.dumps({"schema_version": 1, "benchmark": "weights_quality", **vars(asked), "rows": rows}))


if __name__ == "__main__":
    main()
