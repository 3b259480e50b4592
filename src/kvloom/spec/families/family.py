"""FamilyConfig: the names and the meaning of the config entries of a kind of model. Torch-free."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvloom.errors import InvalidInputError
from kvloom.registry import nearest
from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families.config_reader import ConfigReader

GGUF_CONFIG_KEYS: dict[str, str] = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}
"""Metadata of a GGUF file, after the architecture's prefix, to the equivalent entry of a config.json."""

GGUF_EXPERT_KEYS: dict[str, str] = {
    **GGUF_CONFIG_KEYS,
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}
"""The same of models with experts."""

GPT_GGUF_KEYS: dict[str, str] = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
"""The same of models whose config names entries as that of GPT-2 does."""

_NAMES = {"architectures", "model_type"}
"""Entries that are read before the family is known."""


@dataclass(frozen=True)
class FamilyConfig:
    """One kind of model, as described by its config.

    `architectures` and `model_types` are its names in a config.json, `gguf_architecture` the one in a GGUF file, None
    where kvloom reads no GGUF files of it.
    `configure` reads a config (over `defaults`) into a `DecoderConfig`. `from_gguf` adds to a config made from a
    GGUF file's metadata what GGUF implies and does not write, given the names of its tensors; it edits the config in
    place. `partial_rotary` says that a GGUF file of the family may rotate a part of each head only, `gguf_experts`
    that it has experts: of two families of one architecture there it decides. `quantizations` are the methods of
    `quantization_config` that can be read.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    gguf_architecture: str | None
    defaults: Mapping[str, Any]
    configure: Callable[[ConfigReader], DecoderConfig]
    from_gguf: Callable[[dict[str, Any], Collection[str]], None]
    gguf_config_keys: Mapping[str, str] = field(default_factory=lambda: GGUF_CONFIG_KEYS)
    partial_rotary: bool = False
    gguf_experts: bool = False
    quantizations: tuple[str, ...] = ()

    def read(self, raw: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> DecoderConfig:
        """Return the `DecoderConfig` of a config.json; a nested `text_config` is the one that counts.

        `overrides` are entries that replace the config's. Raises `CheckpointError` for malformed entries,
        `UnsupportedError` for what kvloom cannot run, and `InvalidInputError` for overrides that nothing reads, each
        with all its reasons.
        """
        merged = _text(raw)
        overrides = dict(overrides or {})
        if "rope_scaling" in overrides and isinstance(merged.get("rope_parameters"), dict):
            stored = merged.pop("rope_parameters")  # the newer entry for the same thing, which would win
            merged["rope_theta"] = stored.get("rope_theta", merged.get("rope_theta"))
        merged |= overrides
        reader = ConfigReader(self.name, merged, dict(self.defaults))
        self._check_quantization(reader)
        config = self._configured(reader)
        reader.finish()
        unread = sorted(set(overrides) - reader.read - _NAMES)
        if unread:
            raise InvalidInputError(
                f"hf_overrides: no entry of the config of {self.name} is called {', '.join(unread)}"
                f"{nearest(unread[0], sorted(reader.read))}; leave it out"
            )
        return config

    def shape(self, raw: Mapping[str, Any]) -> tuple[DecoderConfig, tuple[str, ...]]:
        """Return what a config.json describes, and every reason in it why kvloom cannot run it.

        Raises `CheckpointError` for malformed entries.
        """
        reader = ConfigReader(self.name, _text(raw), dict(self.defaults))
        self._check_quantization(reader)
        config = self._configured(reader)
        reader.check_entries()
        return config, reader.refused

    def _check_quantization(self, reader: ConfigReader) -> None:
        quantized = reader.get("quantization_config") or {}
        if quantized and (not isinstance(quantized, dict) or quantized.get("quant_method") not in self.quantizations):
            reader.refuse(f"quantization_config {quantized!r}")

    def _configured(self, reader: ConfigReader) -> DecoderConfig:
        config = self.configure(reader)
        if config.num_heads % config.num_kv_heads:
            reader.wrong("num_attention_heads", f"a multiple of {config.num_kv_heads} KV heads", config.num_heads)
        if config.head_dim % 2:
            reader.wrong("head_dim", "an even number", config.head_dim)
        return config


def _text(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of the text model: those of a nested `text_config` win."""
    text = raw.get("text_config")
    return {**raw, **text} if isinstance(text, dict) else dict(raw)
