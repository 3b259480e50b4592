"""Common config of the older families: LayerNorm, a plain MLP, and other names of entries."""

from collections.abc import Sequence
from typing import Any

from kvloom.spec.decoder import DecoderConfig, LayerConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.skeleton import ACTIVATIONS


def classic(reader: ConfigReader, family: str, layers: Sequence[LayerConfig], **entries: Any) -> DecoderConfig:
    """Return a config with LayerNorms and a plain MLP; `entries` are those that `DecoderConfig` has no default for."""
    width = entries["hidden_size"] // entries["num_heads"]
    if entries["hidden_size"] % entries["num_heads"]:
        reader.wrong("the hidden size", f"a multiple of {entries['num_heads']} heads", entries["hidden_size"])
    common: dict[str, Any] = {
        "family": family,
        "vocab_size": reader.integer("vocab_size"),
        "head_dim": width,
        "layers": tuple(layers),
        "query_scale": width**-0.5,
        "tie_embeddings": reader.flag("tie_word_embeddings"),
        "norm": "layer",
        "norm_bias": True,
        "gated": False,
        "eos_token_ids": reader.token_ids("eos_token_id"),
        "bos_token_id": next(iter(reader.token_ids("bos_token_id")), None),
    }
    return DecoderConfig(**{**common, **entries})


def activation(reader: ConfigReader, key: str) -> str:
    """Return the activation that the entry `key` names."""
    return reader.choice(key, ACTIVATIONS)


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """Return ALiBi's slopes (Press et al. 2022): 2 ** (-8 h / P) of the largest power of two P within the heads.

    Further heads take every other slope of 2 P heads, from the first on.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    more = [2.0 ** (-4.0 * (i + 1) / power) for i in range(0, 2 * (num_heads - power), 2)]
    return (*slopes, *more)
