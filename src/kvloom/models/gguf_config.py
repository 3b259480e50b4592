"""The config.json that a GGUF file's metadata stand for."""

import math
from typing import Any

import numpy as np

from kvloom.errors import CheckpointError, UnsupportedError
from kvloom.models.gguf_ends import end_token_ids
from kvloom.models.gguf_file import GGUFFile
from kvloom.spec.families import FamilyConfig

_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192.0}


def config_of_gguf(file: GGUFFile, family: FamilyConfig) -> dict[str, Any]:
    """Return what the model's config.json would say, from metadata and tensors of the file.

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
    config["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    config["eos_token_id"] = end_token_ids(metadata)
    config["rope_scaling"] = _rope_scaling(file, prefix, config)
    family.from_gguf(config, shapes)
    _check_widths(file, prefix, config, family)
    return config


def _single(values: np.ndarray[Any, Any], key: str, file: GGUFFile) -> Any:
    distinct = np.unique(values)
    if distinct.size != 1:
        raise UnsupportedError(str(file.path), [f"{key} differs between layers"])
    return distinct[0].item()


def _check_widths(file: GGUFFile, prefix: str, config: dict[str, Any], family: FamilyConfig) -> None:
    """Note in `config` which part of a head is rotated, where the family knows parts; refuse other inequalities."""
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


def _rope_scaling(file: GGUFFile, prefix: str, config: dict[str, Any]) -> dict[str, Any] | None:
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
            "short_factor": file.read_array("rope_factors_short.weight").tolist(),
            "long_factor": file.read_array("rope_factors_long.weight").tolist(),
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


def _llama3_scaling(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """Recognise, in the divisors of each frequency, the llama3 kind with the constants of every released model.

    Low frequencies are divided by the factor, high ones by 1, and those between are interpolated; the file holds
    only the divisors, so any other curve is refused.
    """
    divisors = file.read_array("rope_freqs.weight")
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
