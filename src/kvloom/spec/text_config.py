"""The text decoder in the config of a multimodal model, which is all that a plan counts of it."""

from collections.abc import Mapping
from typing import Any

_NESTED = ("thinker_config", "text_config", "llm_config", "language_config")
"""Entries that hold the config of the text decoder, or of a model that holds it."""

_TOWERS = ("vision_config", "audio_config", "vision_tower", "image_token_id", "audio_token_id")
"""Entries of models that have other towers, of which older configs keep the entries of the text decoder beside them."""

_TEXT_MODELS = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "glm4v_moe_text": "glm4_moe",
    "glm4v_text": "glm4",
    "llama4": "llama4_text",
    "llava": "llama",
    "llava_next": "llama",
    "mistral3": "mistral",
    "paligemma": "gemma",
    "qwen2_5_omni_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_omni_moe_text": "qwen3_moe",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_vl_text": "qwen3",
    "voxtral": "llama",
}
"""`model_type` of a wrapper or of its text decoder -> the one that has the same decoder.

That of a wrapper applies where its nested config names none.
"""


def text_config(config: Mapping[str, Any], notes: list[str]) -> Mapping[str, Any]:
    """Return the entries of the text decoder of `config`, itself where it has no other tower.

    Entries of the wrapper that hold for the whole checkpoint (dtype, tied embeddings, quantisation) are added. A note
    names what is not counted.
    """
    nested = next((config[key] for key in _NESTED if isinstance(config.get(key), Mapping)), None)
    family = str(config["model_type"])
    if nested is None:
        if family not in _TEXT_MODELS or not any(config.get(key) is not None for key in _TOWERS):
            return config
        nested = config
    inner = {"model_type": family, **nested}
    for key in ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config"):
        if inner.get(key) is None and config.get(key) is not None:
            inner[key] = config[key]
    if nested is not config and any(isinstance(inner.get(key), Mapping) for key in _NESTED):
        return text_config(inner, notes)
    inner["model_type"] = _TEXT_MODELS.get(str(inner["model_type"]), inner["model_type"])
    notes.append("text decoder only; vision and audio towers are not counted")
    return inner
