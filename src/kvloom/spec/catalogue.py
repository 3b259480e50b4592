"""The shipped catalogue: well-known models by name or Hugging Face id, each with the source of its shape."""

import json
from functools import cache
from importlib import resources
from typing import Any

from kvloom.errors import ModelNotFoundError
from kvloom.registry import near_copy
from kvloom.spec.config_json import spec_from_config
from kvloom.spec.model import ModelSpec


@cache
def _entries() -> tuple[str, dict[str, dict[str, Any]], dict[str, str]]:
    """Return the date of the catalogue, its entries by name, and every lower-cased spelling of each name."""
    data = json.loads(resources.files("kvloom.spec").joinpath("catalogue.json").read_text(encoding="utf-8"))
    entries = {entry["name"]: entry for entry in data["models"]}
    spellings: dict[str, str] = {}
    for name, entry in entries.items():
        for spelling in (name, *entry["ids"], *entry.get("aliases", ())):
            spellings[spelling.lower()] = name
        for repository in entry["ids"]:
            spellings.setdefault(repository.split("/")[1].lower(), name)
    return data["as_of"], entries, spellings


def catalogue_names() -> tuple[str, ...]:
    """Return the names of all models in the catalogue, in its order."""
    return tuple(_entries()[1])


def catalogue_entry(name: str) -> dict[str, Any]:
    """Return the raw entry of a catalogue name: `config`, `ids`, `source`, perhaps `published_params`."""
    return _entries()[1][name]


def find_in_catalogue(model: str) -> str | None:
    """Return the catalogue name of `model` (a name, an alias or an id, in any case), or None."""
    return _entries()[2].get(model.lower())


def catalogue_spec(model: str) -> ModelSpec:
    """Return the shape of a catalogue model; raises `ModelNotFoundError` naming the nearest one."""
    name = find_in_catalogue(model)
    if name is None:
        hint = near_copy(model.lower(), list(_entries()[2]))
        raise ModelNotFoundError(f"no model {model!r} in the catalogue{hint}; `kvloom plan --list-models` shows all")
    entry = _entries()[1][name]
    return spec_from_config(entry["config"], name, f"catalogue of {_entries()[0]}: {entry['source']}")
