"""Tiny random models: real configs of real families, small enough for a test to run them hundreds of times.

Weights are scaled so that attention is far from uniform and logits are of size ten and well apart: a wrong slot,
position or mask changes tokens.
"""

from dataclasses import replace

import numpy as np
import torch

from kvloom.attention.batch import AttentionBatch
from kvloom.attention.reference import ReferenceBackend
from kvloom.cache.kvcache import KVCache
from kvloom.models.decoder import Decoder
from kvloom.models.families.gemma3 import GEMMA3
from kvloom.models.families.gpt_neox import GPT_NEOX
from kvloom.models.families.llama import LLAMA
from kvloom.spec.decoder import DecoderConfig, LayerConfig, RopeConfig
from kvloom.spec.store import NATIVE_STORE, SLAB_BYTES

FAMILIES = {"llama": LLAMA, "gemma3": GEMMA3, "gpt_neox": GPT_NEOX}
PLAIN = {"norm": "layer", "norm_bias": True, "gated": False, "mlp_bias": True, "attention_bias": True,
         "output_bias": True, "parallel_residual": True, "activation": "gelu"}  # fmt: skip
"""Changes that make a `tiny_config` GPT-NeoX: LayerNorms, biases, and a plain MLP in parallel to attention."""
FULL = LayerConfig(None, RopeConfig(10000.0))
LOCAL = LayerConfig(20, RopeConfig(1000.0))


def tiny_config(family: str, **changes: object) -> DecoderConfig:
    """Return a small config: 2 KV heads of 3 layers, but gemma3 has one KV head and windows of 20 in two of three."""
    layers = (LOCAL, LOCAL, FULL) if family == "gemma3" else (FULL,) * 3
    if family == "gpt_neox":
        changes = {**PLAIN, **changes}
    config = DecoderConfig(
        family=family,
        vocab_size=211,
        hidden_size=48,
        intermediate_size=96,
        num_heads=4,
        num_kv_heads=1 if family == "gemma3" else 2,
        head_dim=16,
        layers=layers,
        max_position=4096,
        norm_eps=1e-6,
        activation="gelu_tanh" if family == "gemma3" else "silu",
        query_scale=16**-0.5,
        tie_embeddings=False,
        qk_norm=family == "gemma3",
        sandwich_norm=family == "gemma3",
        embedding_scale=48**0.5 if family == "gemma3" else 1.0,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def random_weights(config: DecoderConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return canonical weights of `config`."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, _, weight in FAMILIES[config.family].expected(config):
        values = torch.randn(weight.shape(config), generator=generator)
        if weight.is_norm:
            weights[name] = 1 + 0.2 * values
        else:
            gain = 1.7 if name.endswith((".q", ".k", "lm_head")) else 1.0
            weights[name] = (values * gain / values.shape[-1] ** 0.5 if values.dim() == 2 else 0.1 * values).to(dtype)
    return weights


def tiny_decoder(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> Decoder:
    """Return a decoder of `tiny_config` with random weights."""
    config = tiny_config(family, **changes)
    return Decoder(config, random_weights(config, dtype, seed))


def cache_of(decoder: Decoder, *, slabs: int = 8, block_size: int = 16, sequences: int = 4) -> KVCache:
    """Return an empty cache for `decoder`."""
    store = NATIVE_STORE[str(decoder.dtype).removeprefix("torch.")]
    return KVCache(decoder.config.kv_spec(block_size, store), slabs * SLAB_BYTES, sequences, decoder.dtype)


def batch_of(work: list[tuple[int, int, list[int]]]) -> AttentionBatch:
    """Return the batch of (sequence, first position, token ids) triples."""
    return AttentionBatch(
        token_ids=np.array([token for _, _, tokens in work for token in tokens], np.int32),
        positions=np.concatenate([np.arange(start, start + len(tokens), dtype=np.int32) for _, start, tokens in work]),
        sequences=np.array([sequence for sequence, _, _ in work], np.int32),
        cu_seqlens_q=np.cumsum([0, *(len(tokens) for _, _, tokens in work)], dtype=np.int32),
    )


def feed(
    decoder: Decoder,
    cache: KVCache,
    sequence: int,
    tokens: list[int],
    *,
    chunk: int = 0,
    total: int | None = None,
    backend: object = None,
) -> torch.Tensor:
    """Put `tokens` through the decoder, `chunk` at a time (0: at once); returns their logits [n, V].

    Rotary frequencies that depend on the length are those of a text of `total` tokens (None: the last of `tokens`
    ends it).
    """
    rows = []
    first = int(cache.lanes.seen[sequence])
    length_class = np.array([decoder.config.length_class(total or first + len(tokens))], np.int32)
    for at in range(0, len(tokens), chunk or len(tokens)):
        part = tokens[at : at + (chunk or len(tokens))]
        assert cache.lanes.extend(sequence, len(part))
        batch = replace(batch_of([(sequence, first + at, part)]), length_class=length_class)
        rows.append(decoder.logits(decoder.forward(batch, cache, backend or ReferenceBackend())))  # type: ignore[arg-type]
    return torch.cat(rows)


def random_tokens(count: int, vocab_size: int = 211, seed: int = 0) -> list[int]:
    """Return `count` token ids."""
    return np.random.default_rng(seed).integers(0, vocab_size, count).tolist()
