"""Checkpoint: the contents of a model's files: config, canonical weights, generation defaults."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvloom.errors import CheckpointError, InvalidInputError, ModelNotFoundError
from kvloom.models.catalogue import CATALOGUE
from kvloom.models.families import FAMILIES, Family
from kvloom.models.hub import download_model, is_hub_id
from kvloom.models.pull import pull
from kvloom.models.tensor_file import TensorFile
from kvloom.registry import near_copy
from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families import family_of_config, family_of_gguf

if TYPE_CHECKING:
    import torch

    from kvloom.models.families.weight import Weight
    from kvloom.models.mxfp4 import Mxfp4Weight
    from kvloom.models.tokenizer import Tokenizer

_HARMLESS_SUFFIXES = (
    ".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias", ".attention.masked_bias", ".attention.bias",
)  # fmt: skip
_HARMLESS_GGUF = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # read by the config


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk. `path` is its folder or GGUF file; weights are read only by `tensors`."""

    name: str
    path: Path
    family: Family
    config: DecoderConfig
    generation_config: dict[str, Any] = field(repr=False)
    _file: TensorFile = field(repr=False)
    _stored_names: dict[str, str] = field(repr=False)

    @cached_property
    def is_gguf(self) -> bool:
        """True when the model is one GGUF file."""
        return self.path.is_file()

    def tensors(self, dtype: torch.dtype, *, borrowed: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Return an iterator over (canonical name, tensor), one CPU tensor at a time, fresh or `borrowed`.

        Borrowed ones may lie in the mapped files: the caller must read them at once and neither keep nor change them.

        Matrices are [out, in] in `dtype`; weights of norms hold what the norm multiplies with, in float32. The names
        are those of `family.expected(config)`. Before the first tensor is read, every missing, unexpected, misshapen
        or unreadable one is named in one `CheckpointError`.
        """
        self.check()
        expected = self.family.expected(self.config)
        return ((name, self._read(layer, weight, dtype, borrowed)) for name, layer, weight in expected)

    def packed_tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor | Mxfp4Weight]]:
        """Return the same as `tensors`, borrowed, but those stored in MXFP4 as `Mxfp4Weight` [experts, out, in]."""
        self.check()
        for name, layer, weight in self.family.expected(self.config):
            [source, *others] = weight.sources(self.config, layer, self.is_gguf)
            stored = None if others else self._in_mxfp4(weight, self._stored_names[source])
            yield name, self._read(layer, weight, dtype, True) if stored is None else stored

    def _in_mxfp4(self, weight: Weight, stored: str) -> Mxfp4Weight | None:
        """Return a weight of experts that is stored in MXFP4, None if it is another."""
        from kvloom.models.mxfp4 import Mxfp4Tensors

        if isinstance(self._file, Mxfp4Tensors):
            found = self._file.stored(stored)
            return None if found is None else found.rows(*weight.mxfp4_rows)
        if not self.is_gguf or len(weight.shape(self.config)) != 3:
            return None
        from kvloom.models.gguf_file import GGUFFile

        assert isinstance(self._file, GGUFFile)
        return self._file.stored(stored)

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer and chat template of the model; raises `CheckpointError`, `UnsupportedError`."""
        from kvloom.models.tokenizer import tokenizer_from_folder, tokenizer_from_gguf

        if not self.is_gguf:
            return tokenizer_from_folder(self.path, self.config.eos_token_ids)
        from kvloom.models.gguf_file import GGUFFile

        assert isinstance(self._file, GGUFFile)
        return tokenizer_from_gguf(self._file, self.config.eos_token_ids)

    def check(self, tokenizer: Tokenizer | None = None) -> None:
        """Raise `CheckpointError` naming every tensor that is missing, unexpected, misshapen or of an unknown type.

        With `tokenizer`, also every token outside the model's vocabulary. A vocabulary larger than the tokenizer's is
        usual.
        """
        faults = self._strange_tokens(tokenizer)
        wanted: set[str] = set()
        shapes, unreadable = self._file.shapes, self._file.unreadable
        for _, layer, weight in self.family.expected(self.config):
            shape = weight.stored_shape(self.config, self.is_gguf)
            for source in weight.sources(self.config, layer, self.is_gguf):
                if source in wanted:
                    continue  # several weights may be parts of one stored tensor
                wanted.add(source)
                fault = self._fault_of(source, shape, shapes, unreadable)
                faults += [] if fault is None else [fault]
        faults += [f"{name} is unexpected" for name in self._stored_names if name not in wanted]
        if faults:
            what = "weights, config and tokenizer do not fit together"
            raise CheckpointError(f"{self.path}: {what} ({len(faults)} faults): {'; '.join(faults)}")

    def _strange_tokens(self, tokenizer: Tokenizer | None) -> list[str]:
        """Return the faults of token ids in config and tokenizer."""
        size = self.config.vocab_size
        ends = [token for token in self.config.eos_token_ids if token >= size]
        faults = [f"the config ends texts with token {token}, but there are {size}" for token in ends]
        beyond = [] if tokenizer is None else tokenizer.needed_beyond(size)
        if beyond:
            some = ", ".join(map(repr, beyond[:8])) + (", ..." if len(beyond) > 8 else "")
            faults.append(f"the tokenizer has {len(beyond)} tokens beyond the model's {size}: {some}")
        return faults

    def _fault_of(
        self, source: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], unreadable: Mapping[str, str]
    ) -> str | None:
        """Return the fault of the stored tensor `source`, which should have `shape`; None if there is none."""
        stored = self._stored_names.get(source)
        if stored is None:
            return f"{source} is missing"
        if shapes[stored] != shape:
            return f"{stored} has shape {list(shapes[stored])}, expected {list(shape)}"
        if stored in unreadable:
            known = "F32, F16, BF16, Q8_0, Q4_0/1, Q5_0/1, Q4/5/6_K, MXFP4" if self.is_gguf else "F64/32/16, BF16"
            return f"{stored} is stored as {unreadable[stored]}, which is not supported (known: {known})"
        return None

    def _read(self, layer: int, weight: Weight, dtype: torch.dtype, borrowed: bool) -> torch.Tensor:
        import torch

        kind = torch.float32 if weight.is_norm else dtype
        names = weight.sources(self.config, layer, self.is_gguf)
        parts = [self._file.read(self._stored_names[source], kind, borrowed=borrowed) for source in names]
        tensor = torch.stack(parts) if "{e}" in (weight.gguf if self.is_gguf else weight.hf) else parts[0]
        return _owned(weight.transform(self.is_gguf)(tensor, self.config).contiguous())


def open_checkpoint(
    model: str, *, revision: str | None = None, overrides: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Return the checkpoint that `model` names.

    `model` is a folder with safetensors, a `.gguf` file, a name of the catalogue or a Hugging Face id, tried in this
    order; the last two are fetched if they are not in their caches. `revision` is a branch, tag or commit of the hub.
    `overrides` are entries that replace those of the model's config.json, or what a GGUF file says in their place.
    Raises `ModelNotFoundError`, `DownloadError`, `CheckpointError` for damaged files and `UnsupportedError` for models
    that kvloom cannot run, with all reasons.
    """
    path = Path(model).expanduser()
    local = bool(model) and path.exists()
    if revision is not None and (local or model in CATALOGUE):
        kind = "a local path" if local else "in the catalogue"
        raise InvalidInputError(f"revision {revision!r} is for models of the hub; {model} is {kind}")
    if local and path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is not a model; expected a folder with safetensors or a .gguf file")
        return _open_gguf(model, path, overrides)
    if local and path.is_dir():
        return _open_folder(model, path, overrides)
    if model in CATALOGUE:
        return _open_gguf(model, pull(model), overrides)
    if is_hub_id(model) and path.suffix != ".gguf":
        return _open_folder(model, download_model(model, revision), overrides)
    hint = near_copy(model, list(CATALOGUE))
    raise ModelNotFoundError(
        f"no model {model!r}{hint}: there is no such folder or .gguf file here, the catalogue has "
        f"{', '.join(CATALOGUE)}, and ids of the hub look like owner/name"
    )


def _open_gguf(name: str, path: Path, overrides: Mapping[str, Any] | None) -> Checkpoint:
    from kvloom.models.gguf_file import GGUFFile
    from kvloom.spec.gguf_config import config_of_gguf

    file = GGUFFile(path)
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{path} does not say its architecture; fetch the model again")
    family = family_of_gguf(architecture, bool(file.metadata.get(f"{architecture}.expert_count")))
    config = family.read(config_of_gguf(file.header, family), overrides)
    names = {name: name for name in file.shapes if name not in _HARMLESS_GGUF}
    return Checkpoint(name, path, FAMILIES.get(family.name), config, {}, file, names)


def _open_folder(name: str, path: Path, overrides: Mapping[str, Any] | None) -> Checkpoint:
    from kvloom.models.safetensors_folder import SafetensorsFolder

    raw = _read_json(path / "config.json", required=True)
    family = FAMILIES.get(family_of_config({**raw, **(overrides or {})}).name)
    config = family.config.read(raw, overrides)
    generation_config = _read_json(path / "generation_config.json", required=False)
    config = replace(config, eos_token_ids=_merged_eos(config, generation_config, path))
    file: TensorFile = SafetensorsFolder(path)
    if _quant_method(raw) == "mxfp4":
        from kvloom.models.mxfp4 import Mxfp4Tensors

        file = Mxfp4Tensors(file)
    names = _text_names(file, family)
    if config.tie_embeddings and family.source_of("lm_head") in names:
        config = _resolve_tie(config, family, file, names)
    return Checkpoint(name, path, family, config, generation_config, file, names)


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    if not path.is_file():
        if required:
            found = sorted(file.name for file in path.parent.glob("*.gguf"))
            hint = f" (give the path of {found[0]} to open that)" if found else ""
            expected = f"expected the folder of a Hugging Face model{hint}"
            raise CheckpointError(f"{path.parent} has no {path.name}; {expected}")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; fetch the model again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def _quant_method(raw: Mapping[str, Any]) -> Any:
    """Return the method by which a checkpoint's weights are quantised, as its config names it, or None."""
    quantized = raw.get("quantization_config")
    return quantized.get("quant_method") if isinstance(quantized, dict) else None


def _merged_eos(config: DecoderConfig, generation_config: dict[str, Any], path: Path) -> tuple[int, ...]:
    found = generation_config.get("eos_token_id")
    extra = found if isinstance(found, list) else [] if found is None else [found]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in extra):
        raise CheckpointError(f"{path / 'generation_config.json'}: eos_token_id is {found!r}, expected token ids")
    return tuple(dict.fromkeys((*config.eos_token_ids, *extra)))


def _text_names(file: TensorFile, family: Family) -> dict[str, str]:
    """Return the name in the file of each tensor of the text model, without prefixes and ignored tensors."""
    names: dict[str, str] = {}
    for stored in file.shapes:
        if stored.startswith(family.ignored) or stored.endswith(_HARMLESS_SUFFIXES):
            continue
        name = stored
        for there, here in family.hf_prefixes:
            if stored.startswith(there):
                name = here + stored.removeprefix(there)
                break
        names[name] = stored
    return names


def _resolve_tie(config: DecoderConfig, family: Family, file: TensorFile, names: dict[str, str]) -> DecoderConfig:
    """Drop a copy of the embeddings stored as output matrix; where the two differ, they are not tied.

    Some checkpoints declare tied embeddings and yet contain both; their values decide, as in transformers.
    """
    import torch

    embed = names.get(family.source_of("embed"))
    head = names[family.source_of("lm_head")]
    if embed is None or file.shapes[embed] != file.shapes[head]:
        return config
    if torch.equal(file.read(embed, torch.float32), file.read(head, torch.float32)):
        del names[family.source_of("lm_head")]
        return config
    return replace(config, tie_embeddings=False)


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in memory of its own, so that a part of a stored tensor does not keep the rest alive."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
