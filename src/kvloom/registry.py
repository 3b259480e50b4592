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
