"""DuoAttention: retrieval heads keep everything, streaming heads sinks and newest (Xiao et al., arXiv 2410.10819)."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from kvloom.errors import InvalidInputError
from kvloom.policies.context import ScoreContext
from kvloom.policies.scorer import RULES, Selector
from kvloom.spec.kv import KVSpec
from kvloom.spec.method import Value

MAX_PATTERN_BYTES = 1 << 20


class Duo(Selector):
    """A pattern [layers][KV heads] of numbers from 0 to 1, learned elsewhere, tells the heads apart.

    Heads of at least `threshold` are retrieval heads; the others keep the first `sinks` positions and the newest
    `window` tokens.
    """

    per_chunk = True
    decodes = True

    def __init__(self, pattern: list[list[float]], threshold: float, sinks: int, window: int) -> None:
        self.retrieves = [[value >= threshold for value in row] for row in pattern]
        self.sinks = sinks
        self.window = window

    def keep(self, context: ScoreContext) -> torch.Tensor:
        """Return everything for retrieval heads, sinks and window for the others."""
        streaming = context.first(self.sinks) | context.newest(self.window)
        retrieval = torch.tensor(self.retrieves[context.layer])[:, None]
        return torch.where(retrieval, context.valid, streaming)

    def bound(self, layer: int, head: int) -> int | None:
        """Return sinks and window for streaming heads."""
        return None if self.retrieves[layer][head] else self.sinks + self.window

    def refusals(self, kv: KVSpec) -> list[str]:
        """Refuse a pattern of another model."""
        shape, own = [len(row) for row in self.retrieves], [layer.num_lanes for layer in kv.layers]
        if shape == own:
            return []
        heads = sorted(set(shape))
        return [
            f"the pattern has {len(shape)} layers of {heads} heads; "
            f"this model has {len(own)} layers of {sorted(set(own))} KV heads"
        ]


def read_pattern(path: str) -> list[list[float]]:
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
        found = [[float(value) for value in row] for row in rows if row]
        if not found or not all(0 <= value <= 1 for row in found for value in row):
            raise ValueError
    except OSError as error:
        raise InvalidInputError(f"pattern {path!r} of duo cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, RecursionError):
        raise InvalidInputError(f"pattern {path!r} of duo is not {wanted}") from None
    return found


def _duo(args: Mapping[str, Value]) -> Duo:
    if "pattern" not in args:
        raise InvalidInputError("duo needs the file that says which heads retrieve: duo(pattern=heads.json)")
    pattern = read_pattern(str(args["pattern"]))
    return Duo(pattern, float(args["threshold"]), int(args["sinks"]), int(args["window"]))


RULES.register("duo", _duo)
