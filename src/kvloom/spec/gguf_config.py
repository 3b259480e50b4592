"""The config.json that is equivalent to a GGUF file's metadata, and the shape of its model. Torch-free."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from kvloom.errors import CheckpointError, UnsupportedError
from kvloom.spec.config_json import spec_from_config
from kvloom.spec.families import FamilyConfig, family_of_gguf
from kvloom.spec.families.family import GGUF_CONFIG_KEYS
from kvloom.spec.gguf_ends import end_token_ids
from kvloom.spec.gguf_header import GGUFHeader
from kvloom.spec.model import DTYPE_BYTES, ModelSpec
from kvloom.spec.shape import model_spec

_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192.0}


def config_of_gguf(file: GGUFHeader, family: FamilyConfig) -> dict[str, Any]:
    """Return the entries of the model's config.json, from metadata and tensors of the file.

    Raises `CheckpointError` when the token embeddings are missing, `UnsupportedError` for experts in a family that has
    none, unequal layers and rotary embeddings that the metadata describe but no supported kind matches.
    """
    metadata, prefix = file.metadata, f"{family.gguf_architecture}."
    shapes = file.shapes
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{file.path} has no tensor 'token_embd.weight'; fetch the model again")
    config: dict[str, Any] = {}
    for key, name in family.gguf_config_keys.items():
        value = metadata.get(prefix + key)
        if isinstance(value, np.ndarray):
            value = _single(value, f"{prefix}{key}", file)
        if value is not None and not (value == 0 and name == "sliding_window"):  # none is written as 0
            config[name] = value
    config["vocab_size"] = shapes["token_embd.weight"][0]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    config["attention_bias"] = bool({"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"} & set(shapes))
    config["mlp_bias"] = "blk.0.ffn_down.bias" in shapes
    config["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    config["eos_token_id"] = end_token_ids(metadata)
    config["rope_scaling"] = _rope_scaling(file, prefix, config)
    family.from_gguf(config, shapes)
    _check_widths(file, prefix, config, family)
    return config


def _single(values: np.ndarray[Any, Any], key: str, file: GGUFHeader) -> Any:
    distinct = np.unique(values)
    if distinct.size != 1:
        raise UnsupportedError(str(file.path), [f"{key} differs between layers"])
    return distinct[0].item()


def _check_widths(file: GGUFHeader, prefix: str, config: dict[str, Any], family: FamilyConfig) -> None:
    """Set in `config` the rotated part of a head, where the family allows a part; refuse other unequal widths."""
    reasons = []
    if file.metadata.get(prefix + "expert_count", 0) and not family.gguf_experts:
        reasons.append(f"{prefix}expert_count is {file.metadata[prefix + 'expert_count']}: experts are not supported")
    width = file.metadata.get(prefix + "attention.key_length")
    value_width = file.metadata.get(prefix + "attention.value_length", width)
    if value_width != width:
        reasons.append(f"keys have {width} elements a head and values {value_width}")
    head_dim = _head_dim(config)
    rotated = file.metadata.get(prefix + "rope.dimension_count", head_dim)
    if head_dim and family.partial_rotary:
        config["partial_rotary_factor"] = rotated / head_dim
    elif head_dim and rotated != head_dim:
        reasons.append(f"only {rotated} of the {head_dim} elements of a head are rotated")
    if reasons:
        raise UnsupportedError(str(file.path), reasons)


def _head_dim(config: dict[str, Any]) -> int:
    if config.get("head_dim"):
        return int(config["head_dim"])
    return int(config.get("hidden_size", 0)) // max(1, int(config.get("num_attention_heads", 1)))


def _rope_scaling(file: GGUFHeader, prefix: str, config: dict[str, Any]) -> dict[str, Any] | None:
    kind = file.metadata.get(prefix + "rope.scaling.type", "none")
    factor = file.metadata.get(prefix + "rope.scaling.factor")
    legacy = file.metadata.get(prefix + "rope.scale_linear")
    if "rope_freqs.weight" in file.shapes:
        return _llama3_scaling(file, config)
    original = file.metadata.get(prefix + "rope.scaling.original_context_length")
    divisors = {"rope_factors_short.weight", "rope_factors_long.weight"}
    if missing := divisors - set(file.shapes) if divisors & set(file.shapes) else set():
        raise CheckpointError(
            f"{file.path} has no tensor {min(missing)!r} beside its counterpart; fetch the model again"
        )
    if divisors <= set(file.shapes):
        if not original:
            key = f"{prefix}rope.scaling.original_context_length"
            raise UnsupportedError(str(file.path), [f"it has rotary divisors of short and long texts, but no {key}"])
        config["original_max_position_embeddings"] = original
        return {
            "rope_type": "longrope",
            "short_factor": file.floats("rope_factors_short.weight").tolist(),
            "long_factor": file.floats("rope_factors_long.weight").tolist(),
            "attention_factor": file.metadata.get(prefix + "rope.scaling.attn_factor"),
        }
    if kind == "yarn":
        return {
            "rope_type": kind,
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": file.metadata.get(prefix + "rope.scaling.yarn_beta_fast"),
            "beta_slow": file.metadata.get(prefix + "rope.scaling.yarn_beta_slow"),
        }
    if kind != "none":
        return {"rope_type": kind, "factor": factor}
    return {"rope_type": "linear", "factor": legacy} if legacy else None


def _llama3_scaling(file: GGUFHeader, config: dict[str, Any]) -> dict[str, Any]:
    """Recognise, in the divisors of each frequency, the llama3 kind with the constants of every released model.

    Low frequencies are divided by the factor, high ones by 1, and those between are interpolated; the file holds
    only the divisors, so any other curve is refused.
    """
    divisors = file.floats("rope_freqs.weight")
    head_dim, base = _head_dim(config), float(config.get("rope_theta", 10000.0))
    factor = float(divisors.max())
    low, high = _LLAMA3_SCALING["low_freq_factor"], _LLAMA3_SCALING["high_freq_factor"]
    wavelengths = 2 * math.pi * base ** (2.0 * np.arange(divisors.size) / head_dim)
    turns = _LLAMA3_SCALING["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if divisors.size != head_dim // 2 or not np.allclose(divisors, expected, rtol=1e-4):
        raise UnsupportedError(str(file.path), ["the divisors of its rotary frequencies fit no supported kind"])
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3_SCALING}


def spec_of_gguf(header: GGUFHeader, name: str) -> ModelSpec:
    """Return the shape of the model in a GGUF file; its weights count as they run: in bfloat16, or experts in MXFP4.

    Raises `UnsupportedError` for an architecture that is not understood, and as `config_of_gguf` does.
    """
    arch = str(header.metadata.get("general.architecture"))
    reader = PLANNED.get(arch)
    if reader is not None:
        spec = spec_from_config(reader(header), name, str(header.path))
    else:
        family = family_of_gguf(arch, bool(header.metadata.get(f"{arch}.expert_count")))
        config, refused = family.shape(config_of_gguf(header, family))
        spec = model_spec(config, name, "bfloat16", source=str(header.path), refused=refused)
    kept = [tensor for tensor in header.tensors.values() if tensor.type_name == "MXFP4" and len(tensor.shape) == 3]
    ending = ", but for experts in MXFP4" if kept else ""
    note = f"the file stores {header.num_bytes} bytes of weights; they run dequantised{ending}"
    dense = header.num_elements - sum(math.prod(tensor.shape) for tensor in kept)
    num_bytes = dense * DTYPE_BYTES[spec.dtype] + sum(tensor.num_bytes for tensor in kept)
    return replace(spec, weight_bytes=num_bytes, file_bytes=header.num_bytes, notes=(*spec.notes, note))


def _planned(header: GGUFHeader, model_type: str) -> dict[str, Any]:
    """Return the entries that every config.json has, from the metadata of an architecture that is planned only."""
    found = {name: _entry(header, key) for key, name in GGUF_CONFIG_KEYS.items()}
    found["num_key_value_heads"] = found["num_key_value_heads"] or found["num_attention_heads"]
    found["vocab_size"] = header.shapes.get("token_embd.weight", (None,))[0]
    tied = "output.weight" not in header.shapes
    return {**found, "model_type": model_type, "dtype": "bfloat16", "tie_word_embeddings": tied}


def _entry(header: GGUFHeader, key: str) -> Any:
    name = f"{header.metadata['general.architecture']}.{key}"
    value = header.metadata.get(name)
    return _single(value, name, header) if isinstance(value, np.ndarray) else value


def _deepseek2(header: GGUFHeader) -> dict[str, Any]:
    def of(*keys: str) -> Any:
        return next((value for value in (_entry(header, key) for key in keys) if value is not None), None)

    rope = of("rope.dimension_count")
    return {
        **_planned(header, "deepseek_v2"),
        "q_lora_rank": of("attention.q_lora_rank"),
        "kv_lora_rank": of("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": of("attention.key_length_mla", "attention.key_length") - rope,
        "v_head_dim": of("attention.value_length_mla", "attention.value_length"),
        "n_routed_experts": of("expert_count"),
        "num_experts_per_tok": of("expert_used_count"),
        "n_shared_experts": of("expert_shared_count"),
        "moe_intermediate_size": of("expert_feed_forward_length"),
        "first_k_dense_replace": of("leading_dense_block_count"),
    }


PLANNED: dict[str, Callable[[GGUFHeader], dict[str, Any]]] = {"deepseek2": _deepseek2}
"""Architectures of GGUF files that are planned and do not run, with what makes their config.json."""
