"""Families beside Llama and Gemma 3 in GGUF files: the logits of the model that was written."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quant

from harness.families import BASE, VARIANTS, expected_logits, longrope, oracle_of
from harness.tiny_model import cache_of, feed, random_tokens
from harness.tolerances import LOGITS_FLOAT32
from kvloom.models.checkpoint import open_checkpoint
from kvloom.models.decoder import Decoder

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_NAMES = {
    **NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
CASES = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral, window": ("llama", {"attention.sliding_window": 11}),
    "gemma": ("gemma", {}),
    "olmo2": ("olmo2", {}),
    "gemma2": ("gemma2", {"attention.sliding_window": 9, "attn_logit_softcapping": 3.0,
                          "final_logit_softcapping": 8.0}),
    "phi3": ("phi3", {"attention.sliding_window": 0}),
    "phi3, longrope": ("phi3", {"rope.scaling.original_context_length": 32}),
    "phi3, longrope on half of each head": ("phi3", {"rope.scaling.original_context_length": 32,
                                                     "rope.dimension_count": 8}),
}  # fmt: skip


def paired(values, num_heads):
    """Put rows i and i + half of each head next to each other, as converters do for llama."""
    half = values.shape[0] // num_heads // 2
    return values.reshape(num_heads, 2, half, -1).swapaxes(1, 2).reshape(values.shape)


def gguf_name(name, family):
    """Return what a tensor of transformers is called in a GGUF file."""
    stem, _, suffix = name.rpartition(".")
    names = GEMMA_NAMES if family in ("gemma2", "olmo2") else NAMES
    if not stem.startswith("model.layers."):
        return f"{names[stem]}.{suffix}"
    layer, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{names[rest]}.{suffix}"


def write(path, family, model, metadata, factors, quant=None):
    """Write `model` as a GGUF file of `family`; matrices in `quant` if it is given."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_eos_token_id(2)
    for key, value in metadata.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"{family}.{key}", value)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.float().numpy()
        if family == "llama" and (".q_proj." in name or ".k_proj." in name):
            values = paired(values, config.num_attention_heads if ".q_" in name else config.num_key_value_heads)
        if family in ("gemma", "gemma2") and values.ndim == 1:
            values = values + 1
        if quant is not None and values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(gguf_name(name, family), gguf.quantize(values, quant), raw_dtype=quant)
        else:
            writer.add_tensor(gguf_name(name, family), np.ascontiguousarray(values))
    for name, values in factors.items():
        writer.add_tensor(name, np.array(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def factors_of(variant):
    """Return the divisors of a LongRoPE variant as a GGUF file has them."""
    if "longrope" not in variant:
        return {}
    params = longrope(8 if "half" in variant else 12)["rope_parameters"]
    return {f"rope_factors_{kind}.weight": params[f"{kind}_factor"] for kind in ("long", "short")}


@pytest.mark.parametrize("variant", CASES)
def test_a_gguf_file_has_the_logits_of_the_model_that_was_written(variant, tmp_path, monkeypatch):
    family, metadata = CASES[variant]
    if family == "gemma2":  # GGUF does not write the scale of queries: it is that of the head size
        kind, changes = VARIANTS[variant]
        monkeypatch.setitem(VARIANTS, variant, (kind, {**changes, "query_pre_attn_scalar": 16}))
    oracle = oracle_of(variant)
    path = write(tmp_path / "tiny.gguf", family, oracle, metadata, factors_of(variant))
    checkpoint = open_checkpoint(str(path))
    decoder = Decoder(checkpoint.config, dict(checkpoint.tensors(torch.float32)))
    for length in (28, 70):
        tokens = random_tokens(length, BASE["vocab_size"])
        cache = cache_of(decoder)
        logits = feed(decoder, cache, cache.lanes.open(), tokens)
        assert (logits - expected_logits(oracle, tokens)).abs().max() < LOGITS_FLOAT32


@pytest.mark.parametrize("quant", [Quant.Q8_0, Quant.Q4_0, Quant.Q4_1, Quant.Q5_0, Quant.Q5_1, Quant.F16, Quant.BF16])
def test_parts_of_a_fused_quantised_matrix_have_the_values_of_the_gguf_package(quant, tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "phi3", ("Phi3", {"hidden_size": 64, "intermediate_size": 96}))
    oracle = oracle_of("phi3")
    path = write(tmp_path / "tiny.gguf", "phi3", oracle, {}, {}, quant)
    found = dict(open_checkpoint(str(path)).tensors(torch.float32))
    reader = gguf.GGUFReader(path)
    [stored] = [tensor for tensor in reader.tensors if tensor.name == "blk.1.attn_qkv.weight"]
    whole = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).reshape(-1, 64).astype(np.float32))
    assert torch.equal(torch.cat([found[f"layers.1.{name}"] for name in "qkv"]), whole)
