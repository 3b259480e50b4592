"""Head pattern: a file with the retrieval score of each KV head of a model (DuoAttention). Torch-free."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from kvloom.errors import InvalidInputError
from kvloom.spec.kv import KVSpec

MAX_PATTERN_BYTES = 1 << 20


@lru_cache(maxsize=64)
def read_pattern(path: str) -> tuple[tuple[float, ...], ...]:
    """Return the numbers in a file: a JSON list of lists, or lines of numbers with tabs or blanks in between.

    Raises `InvalidInputError` without quoting the file.
    """
    wanted = "a list of layers, each a list of numbers from 0 to 1, one for each KV head (JSON, or lines of numbers)"
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(MAX_PATTERN_BYTES + 1)
        if len(text) > MAX_PATTERN_BYTES:
            raise ValueError
        rows = json.loads(text) if text.lstrip().startswith("[") else [line.split() for line in text.splitlines()]
        found = tuple(tuple(float(value) for value in row) for row in rows if row)
        if not found or not all(0 <= value <= 1 for row in found for value in row):
            raise ValueError
    except OSError as error:
        raise InvalidInputError(f"pattern {path!r} of duo cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, RecursionError):
        raise InvalidInputError(f"pattern {path!r} of duo is not {wanted}") from None
    return found


def streaming_limits(args: Mapping[str, int | float | bool | str], kv: KVSpec) -> tuple[int | None, ...] | None:
    """Return for each lane the sum of sinks and window, or None where the pattern marks a retrieval head.

    None for all when no pattern is given or its shape is that of another model, which is refused elsewhere.
    """
    if "pattern" not in args:
        return None
    rows = read_pattern(str(args["pattern"]))
    if [len(row) for row in rows] != [layer.num_lanes for layer in kv.layers]:
        return None
    limit, threshold = int(args["sinks"]) + int(args["window"]), float(args["threshold"])
    return tuple(
        None if value >= threshold else limit
        for row, layer in zip(rows, kv.layers, strict=True)
        if layer.source is None
        for value in row
    )
