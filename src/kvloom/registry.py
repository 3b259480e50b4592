"""Registries of named entries (stores, policies, families, backends); an unknown name is refused with the nearest."""

import difflib
from collections.abc import Iterator
from typing import Generic, TypeVar

from kvloom.errors import InvalidInputError

T = TypeVar("T")


def nearest(name: str, known: list[str]) -> str:
    """Return ` (did you mean 'x'?)` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def near_copy(name: str, known: list[str]) -> str:
    """Return the hint of `nearest` only where `name` is a slip of the pen; names of models differ by little else.

    `opt` and `mpt`, `mistral3` and `mistral`, `gptj` and `gpt2` are different models: digits must be the same ones, and
    all but one letter in six. `ForCausalLM`, which all share, does not count.
    """
    stems = {entry.removesuffix(_SHARED).lower(): entry for entry in known}
    stem = name.removesuffix(_SHARED).lower()
    alike = [entry for entry in stems if _digits(entry) == _digits(stem)]
    close = difflib.get_close_matches(stem, alike, n=1, cutoff=0.82)
    return f" (did you mean {stems[close[0]]!r}?)" if close else ""


_SHARED = "ForCausalLM"


def _digits(name: str) -> list[str]:
    return [letter for letter in name if letter.isdigit()]


class Registry(Generic[T]):
    """An ordered map from name to entry; names are unique, and registering one twice is an error."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> T:
        """Add `entry` under `name`; raises `InvalidInputError` when the name is taken."""
        if name in self._entries:
            raise InvalidInputError(f"{self.kind} {name!r} is registered already; choose another name")
        self._entries[name] = entry
        return entry

    def get(self, name: str) -> T:
        """Return the entry called `name`; raises `InvalidInputError` naming the nearest one."""
        if name not in self._entries:
            hint = nearest(name, list(self._entries))
            raise InvalidInputError(f"unknown {self.kind} {name!r}{hint}; known: {', '.join(self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def items(self) -> list[tuple[str, T]]:
        """Return all (name, entry) pairs in the order of registration."""
        return list(self._entries.items())
