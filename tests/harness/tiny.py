"""Tiny random models of every family, as transformers saves them and as GGUF files, for tests of exactness."""

import json
import warnings

import gguf
import numpy as np
import torch

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA3 = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "max_position_embeddings": 256,
}
FAMILIES = {"llama": LLAMA, "gemma3": GEMMA3}

_LLAMA_KEYS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA_KEYS = {
    **_LLAMA_KEYS,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


def tiny_model(family, **changes):
    """Return a random float32 model of transformers; `changes` go to its config. Norm weights are random too."""
    import transformers

    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    }[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**FAMILIES[family], **changes})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                weight.add_(torch.randn_like(weight) * 0.2)
    return model


def save_tiny(folder, family, shard_size="5GB", **changes):
    """Save a tiny model into `folder` as transformers does; return it."""
    model = tiny_model(family, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about generation settings of random models
        model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def edit_json(path, **changes):
    """Change entries of a JSON object in a file; None removes one."""
    value = json.loads(path.read_text()) if path.is_file() else {}
    value = {key: entry for key, entry in {**value, **changes}.items() if entry is not None}
    path.write_text(json.dumps(value))


def write_tiny_gguf(path, family, model, skip=(), quant=None, extra=None, **metadata):
    """Write `model` as a GGUF file the way converters do: rows of q and k paired for Llama, norms as 1 + w for Gemma.

    Tensors in `skip` are left out and those in `extra` added; matrices are quantised to `quant` (a
    `GGMLQuantizationType`) if given; `metadata` are entries below the architecture's prefix, with dots as `__`.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if family == "gemma3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base(10000.0 if family == "llama" else 1e6)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    for key, value in metadata.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](f"{family}.{key.replace('__', '.')}", value)
    for name, weight in model.state_dict().items():
        target = _gguf_name(name, _LLAMA_KEYS if family == "llama" else _GEMMA_KEYS)
        if target in skip or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        values = weight.float().numpy()
        if family == "llama" and ".attn_q." in target:
            values = _paired(values, config.num_attention_heads)
        elif family == "llama" and ".attn_k." in target:
            values = _paired(values, config.num_key_value_heads)
        elif family == "gemma3" and target.endswith("norm.weight"):
            values = values + 1
        if quant is not None and values.ndim == 2:
            writer.add_tensor(target, gguf.quantize(values, quant), raw_dtype=quant)
        else:
            writer.add_tensor(target, np.ascontiguousarray(values))
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name, keys):
    stem, _, suffix = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{keys[stem]}.{suffix}"
    layer, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{keys[rest]}.{suffix}"


def _paired(values, num_heads):
    """Put rows i and i + half of each head next to each other."""
    half = values.shape[0] // num_heads // 2
    return values.reshape(num_heads, 2, half, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
