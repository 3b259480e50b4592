"""GGUF files: key-value metadata and tensor sizes, read with the standard library alone. Little-endian, version 2, 3.

Layout: magic, version, tensor count, key count; keys with typed values; for each tensor name, shape, type, offset.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from kvloom.errors import CheckpointError, UnsupportedError
from kvloom.registry import nearest

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_COUNT = 1 << 24

_TENSOR_TYPES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip
"""Elements and bytes of one block of each tensor type, by the type's number."""


@dataclass(frozen=True)
class GGUFMetadata:
    """Scalars and short arrays by key (of longer arrays only the length, under `key + ".length"`), and tensors."""

    values: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], int]]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(size for _, size in self.tensors.values())

    @property
    def num_elements(self) -> int:
        """Elements of all tensors."""
        return sum(prod(shape) for shape, _ in self.tensors.values())


class _Reader:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file = file
        self.path = path

    def take(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise CheckpointError(f"{self.path} ends early; the file is truncated, fetch it again")
        return data

    def scalar(self, kind: int) -> Any:
        code = _SCALARS[kind]
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def count(self) -> int:
        number = int(self.scalar(10))
        if number > _MAX_COUNT:
            raise CheckpointError(f"{self.path} claims {number} entries; the file is damaged")
        return number

    def string(self) -> str:
        return self.take(self.count()).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(kind)
        raise CheckpointError(f"{self.path} holds a value of unknown type {kind}; the file is damaged or newer")

    def array(self) -> tuple[int, list[Any]]:
        kind, count = int(self.scalar(4)), self.count()
        if kind in _SCALARS:
            code = _SCALARS[kind][1]
            data = self.take(count * struct.calcsize("<" + code))
            return count, list(struct.unpack(f"<{count}{code}", data)) if count <= 1024 else []
        if kind != _STRING:
            raise CheckpointError(f"{self.path} holds an array of unknown type {kind}; the file is damaged or newer")
        for _ in range(count):
            self.file.seek(self.count(), 1)
        return count, []


def read_gguf(path: Path) -> GGUFMetadata:
    """Return the metadata of `path`; raises `CheckpointError` when it is no GGUF file or damaged."""
    try:
        with path.open("rb", buffering=1 << 20) as file:
            return _read(_Reader(file, path))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _read(reader: _Reader) -> GGUFMetadata:
    if reader.take(4) != b"GGUF":
        raise CheckpointError(f"{reader.path} is not a GGUF file")
    version = reader.scalar(4)
    if version not in (2, 3):
        raise CheckpointError(f"{reader.path} has GGUF version {version}; versions 2 and 3 are understood")
    num_tensors, num_keys = reader.count(), reader.count()
    values: dict[str, Any] = {}
    for _ in range(num_keys):
        key, kind = reader.string(), int(reader.scalar(4))
        if kind == _ARRAY:
            values[key + ".length"], values[key] = reader.array()
        else:
            values[key] = reader.value(kind)
    tensors: dict[str, tuple[tuple[int, ...], int]] = {}
    for _ in range(num_tensors):
        name = reader.string()
        shape = tuple(int(reader.scalar(10)) for _ in range(int(reader.scalar(4))))
        kind = int(reader.scalar(4))
        reader.scalar(10)
        if kind not in _TENSOR_TYPES:
            raise CheckpointError(f"tensor {name} of {reader.path} has unknown type {kind}")
        elements, size = _TENSOR_TYPES[kind]
        tensors[name] = (shape, prod(shape) // elements * size)
    return GGUFMetadata(values, tensors)


_FAMILIES = {
    "llama": "llama", "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text", "qwen2": "qwen2",
    "qwen3": "qwen3", "qwen3moe": "qwen3_moe", "phi3": "phi3", "deepseek2": "deepseek_v2", "gpt-oss": "gpt_oss",
    "gpt2": "gpt2", "smollm3": "smollm3",
}  # fmt: skip


def config_from_gguf(metadata: GGUFMetadata, name: str) -> dict[str, Any]:
    """Return the fields of a config.json that the metadata describes.

    Raises `UnsupportedError` for an architecture that is not understood.
    """
    values = metadata.values
    arch = str(values.get("general.architecture"))
    if arch not in _FAMILIES:
        hint = nearest(arch, list(_FAMILIES))
        raise UnsupportedError(f"cannot plan {name}", [f"GGUF architecture {arch!r} is not understood{hint}; "
                                                       f"understood: {', '.join(_FAMILIES)}"])
    def of(key: str) -> Any:
        found = values.get(f"{arch}.{key}")
        return (found[0] if len(set(found)) == 1 else found) if isinstance(found, list) and found else found

    embedding = metadata.tensors.get("token_embd.weight")
    vocab = embedding[0][1] if embedding else values.get("tokenizer.ggml.tokens.length")
    heads = of("attention.head_count")
    config = {
        "model_type": _FAMILIES[arch], "dtype": "bfloat16", "hidden_size": of("embedding_length"),
        "num_hidden_layers": of("block_count"), "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv") or heads, "head_dim": of("attention.key_length"),
        "intermediate_size": of("feed_forward_length"), "vocab_size": vocab,
        "max_position_embeddings": of("context_length"), "sliding_window": of("attention.sliding_window") or None,
        "tie_word_embeddings": "output.weight" not in metadata.tensors,
    }  # fmt: skip
    experts, used = of("expert_count"), of("expert_used_count")
    if arch == "llama" and experts:
        config |= {"model_type": "mixtral", "num_local_experts": experts, "num_experts_per_tok": used}
    elif arch == "llama" and config["sliding_window"]:
        config["model_type"] = "mistral"
    elif arch == "gpt-oss":
        config |= {"num_local_experts": experts, "num_experts_per_tok": used,
                   "intermediate_size": of("expert_feed_forward_length")}
    elif arch == "qwen3moe":
        config |= {"num_experts": experts, "num_experts_per_tok": used,
                   "moe_intermediate_size": of("expert_feed_forward_length")}
    elif arch == "gpt2":
        config |= {"n_embd": config["hidden_size"], "n_layer": config["num_hidden_layers"], "n_head": heads,
                   "n_inner": config["intermediate_size"], "n_positions": config["max_position_embeddings"]}
    elif arch == "deepseek2":
        rope = of("rope.dimension_count")
        full_key = of("attention.key_length_mla") or of("attention.key_length")
        config |= {
            "q_lora_rank": of("attention.q_lora_rank"), "kv_lora_rank": of("attention.kv_lora_rank"),
            "qk_rope_head_dim": rope, "qk_nope_head_dim": full_key - rope,
            "v_head_dim": of("attention.value_length_mla") or of("attention.value_length"),
            "n_routed_experts": experts, "num_experts_per_tok": used, "n_shared_experts": of("expert_shared_count"),
            "moe_intermediate_size": of("expert_feed_forward_length"),
            "first_k_dense_replace": of("leading_dense_block_count"),
        }  # fmt: skip
    return config
