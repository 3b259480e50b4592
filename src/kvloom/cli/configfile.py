"""`--config FILE.yaml`: the flags of one command, from a file. Command line and environment take precedence."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from kvloom.errors import InvalidInputError
from kvloom.registry import nearest


def read_config(path: Path, options: Mapping[str, click.Option]) -> dict[str, Any]:
    """Return the values in `path` by parameter name; `options` are the flags of the command, by flag name.

    Keys are flag names without the dashes in front (`max-model-len` or `max_model_len`). Raises `InvalidInputError`
    for unreadable YAML, an unknown or repeated key, and a value that the flag cannot take.
    """
    values: dict[str, Any] = {}
    for key, value in _pairs(path):
        flag = key.replace("_", "-")
        option = options.get(flag)
        if option is None:
            known = ", ".join(sorted(options))
            raise InvalidInputError(f"{path}: unknown key {key!r}{nearest(flag, list(options))}; known: {known}")
        if option.name in values:
            raise InvalidInputError(f"{path}: {key!r} is given twice")
        values[str(option.name)] = _flag_value(f"{path}: {key}", option, value)
    return values


def _pairs(path: Path) -> list[tuple[str, Any]]:
    """Return the top-level (key, value) pairs, repeated keys included."""
    import yaml

    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            raise InvalidInputError(f"{path} must be a YAML mapping from flag names to values")
        return [(str(key.value), loader.construct_document(value)) for key, value in node.value]
    except OSError as error:
        raise InvalidInputError(f"cannot read the config file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def _flag_value(where: str, option: click.Option, value: Any) -> Any:
    """Return `value` in the form in which click converts and checks it."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise InvalidInputError(f"{where} must be true or false, not {value!r}")
        return value
    if isinstance(value, bool) or value is None:
        raise InvalidInputError(f"{where} must be a value of type {option.type.name}, not {value!r}")
    if option.multiple:
        return [str(item) for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list):
        raise InvalidInputError(f"{where} takes one value, not a list")
    return str(value)
