"""Writes tiny models of transformers as GGUF files, laid out as converters lay them out.

Tensors are named by the `gguf` package's own tables.
"""

import gguf
import numpy as np


def paired(values, num_heads):
    """Put rows i and i + half of each head next to each other, as converters do for llama."""
    half = values.shape[0] // num_heads // 2
    return values.reshape(num_heads, 2, half, -1).swapaxes(1, 2).reshape(values.shape)


def metadata_of(arch, config):
    """Return what converters write below the architecture's prefix."""

    def first(*names):
        return next(getattr(config, name) for name in names if getattr(config, name, None) is not None)

    heads, hidden = first("num_attention_heads", "n_head", "n_heads"), first("hidden_size", "n_embd", "d_model")
    found = {
        "block_count": first("num_hidden_layers", "n_layer", "n_layers"),
        "context_length": 2048 if arch in ("falcon", "bloom") else first("max_position_embeddings", "max_seq_len"),
        "embedding_length": hidden,
        "feed_forward_length": 4 * hidden if arch == "falcon" else getattr(config, "intermediate_size", 4 * hidden),
        "attention.head_count": heads,
    }
    if hasattr(config, "rms_norm_eps"):
        found["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
        found["attention.head_count_kv"] = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or hidden // heads
        found["attention.key_length"] = found["attention.value_length"] = width
        found["rope.freq_base"] = float(config.rope_parameters["rope_theta"])
    else:
        found["attention.layer_norm_epsilon"] = first("layer_norm_eps", "layer_norm_epsilon")
    if arch == "gptneox":
        part = config.rope_parameters.get("partial_rotary_factor", 1.0)
        found |= {"rope.dimension_count": int(part * (hidden // heads)),
                  "use_parallel_residual": config.use_parallel_residual}  # fmt: skip
    if arch == "falcon":
        found["attention.head_count_kv"] = config.num_kv_heads if config.new_decoder_architecture else 1
    if arch == "starcoder":
        found["attention.head_count_kv"] = 1
    if arch == "mpt":
        clip = config.attn_config.clip_qkv
        found |= {"attention.max_alibi_bias": float(config.attn_config.alibi_bias_max),
                  **({} if clip is None else {"attention.clamp_kqv": clip})}  # fmt: skip
    if hasattr(config, "num_experts_per_tok"):
        found |= {"expert_count": first("num_local_experts", "num_experts"),
                  "expert_used_count": config.num_experts_per_tok}  # fmt: skip
    if arch == "qwen3moe":
        found["expert_feed_forward_length"] = config.moe_intermediate_size
    if arch == "gpt-oss":
        rope = config.rope_parameters
        found |= {"expert_feed_forward_length": config.intermediate_size,
                  "attention.sliding_window": config.sliding_window,
                  "rope.scaling.type": "yarn",
                  "rope.scaling.factor": float(rope["factor"]),
                  "rope.scaling.original_context_length": rope["original_max_position_embeddings"]}  # fmt: skip
    return found


def laid_out(arch, name, values, config):
    """Yield (name, values) of what becomes of one tensor of transformers."""
    if arch == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        values = values.T
    elif "query_key_value" in name:
        groups = getattr(config, "num_kv_heads", None) if getattr(config, "new_decoder_architecture", False) else None
        heads = getattr(config, "num_attention_heads", None) or config.n_head
        groups = groups or (1 if arch == "falcon" else heads)
        split = values.reshape(groups, heads // groups + 2, config.hidden_size // heads, *values.shape[1:])
        parts = (split[:, :-2], split[:, -2:-1], split[:, -1:])
        values = np.concatenate([part.reshape(-1, *values.shape[1:]) for part in parts])
    elif arch in ("llama", "smollm3") and (".q_proj." in name or ".k_proj." in name):
        values = paired(values, config.num_attention_heads if ".q_" in name else config.num_key_value_heads)
    if "experts.gate_up_proj" in name:
        if arch == "gpt-oss":
            values = values if values.ndim == 2 else values.swapaxes(1, 2)
            halves = values[:, ::2], values[:, 1::2]
        else:
            halves = np.split(values, 2, axis=1)
        for half, kind in zip(halves, ("gate_proj", "up_proj"), strict=True):
            yield name.replace("gate_up_proj", kind), half
    elif arch == "gpt-oss" and name.endswith("experts.down_proj"):
        yield name, values.swapaxes(1, 2)
    else:
        yield name, values


def gguf_name(names, name):
    """Return what the `gguf` package calls a tensor of transformers."""
    name = name.replace("sinks", "sinks.weight")
    if "experts." in name and not name.endswith(("_bias", ".weight", ".bias")):
        name += ".weight"
    name = name.replace("_proj_bias", "_proj.bias")
    spellings = (name, name.removeprefix("transformer."), name.replace(".mlp.", ".block_sparse_moe."))
    return next(filter(None, (names.get_name(other, try_suffixes=(".weight", ".bias")) for other in spellings)))


def write(path, arch, oracle, quant=None, **changes):
    """Write `oracle` as a GGUF file of `arch`; matrices that a type's blocks divide in `quant`, if it is given."""
    config = oracle.config
    writer = gguf.GGUFWriter(path, arch)
    metadata = {**metadata_of(arch, config), **changes}
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        adders[type(value)](f"{arch}.{key}", value)
    writer.add_eos_token_id(2)
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, metadata["block_count"])
    for name, weight in oracle.state_dict().items():
        if name.startswith(("lm_head", "embed_out")) and config.tie_word_embeddings:
            continue
        for stored, values in laid_out(arch, name, weight.float().numpy(), config):
            target, values = gguf_name(names, stored), np.ascontiguousarray(values)
            if quant is not None and values.ndim > 1 and values.shape[-1] % gguf.GGML_QUANT_SIZES[quant][0] == 0:
                writer.add_tensor(target, gguf.quantize(values, quant), raw_dtype=quant)
            else:
                writer.add_tensor(target, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
