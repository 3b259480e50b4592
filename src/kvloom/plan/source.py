"""Where a model's shape comes from: a folder, a config.json, a GGUF file, the catalogue, or a hub's local cache."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kvloom.errors import ModelNotFoundError
from kvloom.spec.catalogue import catalogue_spec, find_in_catalogue
from kvloom.spec.config_json import read_config, spec_from_config
from kvloom.spec.model import DTYPE_BYTES, ModelSpec
from kvloom.spec.safetensors_header import read_weight_files

Fetch = Callable[[str, str], Path]
"""Fetches (repository, file) from a hub and returns its path; raises `ModelNotFoundError` or `DownloadError`."""


def find_model(model: str, fetch: Fetch | None = None) -> ModelSpec:
    """Return the shape of `model`.

    Searched in this order: a path (folder, config.json or .gguf), a repository in the hub's local cache, the
    catalogue, and, when `fetch` is given, the hub. Raises `ModelNotFoundError` naming the nearest known name.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return from_folder(path, path.name)
    if path.is_file():
        return from_gguf(path) if path.suffix == ".gguf" else from_config(path, path.parent.name or path.stem)
    if path.suffix in (".gguf", ".json") or model.startswith((".", "~", os.sep)):
        raise ModelNotFoundError(f"there is no file or folder {model!r}; check the path")
    cached = cached_snapshot(model)
    if cached is not None:
        return from_folder(cached, model)
    if find_in_catalogue(model) is not None:
        return catalogue_spec(model)
    if fetch is not None and model.count("/") == 1:
        return from_config(fetch(model, "config.json"), model)
    return catalogue_spec(model)


def from_config(path: Path, name: str) -> ModelSpec:
    """Return the shape that the config.json at `path` describes; weights are computed from it."""
    return spec_from_config(read_config(path), name, str(path))


def from_folder(folder: Path, name: str) -> ModelSpec:
    """Return the shape in `folder`, with exact weight bytes when safetensors files lie beside the config."""
    config = folder / "config.json"
    if not config.exists():
        found = sorted(folder.glob("*.gguf"))
        if len(found) == 1:
            return from_gguf(found[0])
        raise ModelNotFoundError(f"{folder} holds no config.json" + (f" and {len(found)} .gguf files" if found else ""))
    spec = from_config(config, name)
    weights = read_weight_files(folder)
    if weights is None:
        return spec
    dtype = weights.dtype if spec.weight_format is None and weights.dtype in DTYPE_BYTES else spec.dtype
    notes = list(spec.notes)
    if spec.weight_format is None and weights.num_elements != spec.num_params:
        notes.append(f"the files hold {weights.num_elements} numbers, the config says {spec.num_params}")
    return replace(spec, dtype=dtype, weight_bytes=weights.num_bytes, file_bytes=weights.num_bytes, notes=tuple(notes))


def from_gguf(path: Path) -> ModelSpec:
    """Return the shape of a GGUF file; its weights count as dequantised to bfloat16, which is how they run."""
    from kvloom.spec.gguf_config import spec_of_gguf
    from kvloom.spec.gguf_header import GGUFHeader

    return spec_of_gguf(GGUFHeader(path), path.stem)


def cached_snapshot(repository: str) -> Path | None:
    """Return the newest snapshot of `repository` in the hub's local cache that has a config.json, or None."""
    if repository.count("/") != 1:
        return None
    home = os.environ.get("HF_HOME")
    shared = os.path.expanduser(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    root = Path(home) if home else Path(shared) / "huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE", root / "hub"))
    snapshots = hub / f"models--{repository.replace('/', '--')}" / "snapshots"
    if not snapshots.is_dir():
        return None
    found = [folder for folder in snapshots.iterdir() if (folder / "config.json").exists()]
    return max(found, key=lambda folder: folder.stat().st_mtime, default=None)
