"""Kinds of values in a request body: each checks one value and describes itself as a JSON schema."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from kvloom.registry import nearest

INT64 = 2**63 - 1


class Kind(Protocol):
    """A kind of value; `read` returns the value or raises `ValueError` saying what was expected."""

    def read(self, value: Any) -> Any:
        """Return the checked value."""

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema."""

    def strangers(self, value: Any, path: str) -> Iterator[str]:
        """Yield what is to be said about each entry of a checked `value` at `path` that nothing here knows."""


class Leaf:
    """A kind of value without entries of its own that could be unknown."""

    def strangers(self, value: Any, path: str) -> Iterator[str]:
        """Yield nothing."""
        return iter(())


@dataclass(frozen=True)
class Boolean(Leaf):
    """true or false."""

    def read(self, value: Any) -> bool:
        """Return `value`; `ValueError` unless it is a JSON boolean."""
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return value

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        return {"type": "boolean"}


@dataclass(frozen=True)
class Integer(Leaf):
    """A whole number from `low` to `high`."""

    low: int = -INT64
    high: int = INT64

    def read(self, value: Any) -> int:
        """Return `value`; a number without a fraction such as 16.0 counts as whole."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise ValueError(f"a whole number from {self.low} to {self.high}")
        return value

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True)
class Number(Leaf):
    """A finite number from `low` to `high`."""

    low: float
    high: float

    def read(self, value: Any) -> float:
        """Return `value` as a float."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            raise ValueError(f"a number from {self.low:g} to {self.high:g}")
        if not math.isfinite(value):
            raise ValueError("a finite number")
        return float(value)

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        return {"type": "number", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True)
class Text(Leaf):
    """A string of at most `most` characters, one of `choices` where there are any."""

    most: int | None = None
    least: int = 0
    choices: tuple[str, ...] = ()

    def read(self, value: Any) -> str:
        """Return `value`."""
        if not isinstance(value, str):
            raise ValueError("a string")
        if self.choices and value not in self.choices:
            raise ValueError("one of " + ", ".join(repr(choice) for choice in self.choices))
        if len(value) < self.least or (self.most is not None and len(value) > self.most):
            raise ValueError(f"a string of {self.least} to {self.most} characters")
        return value

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        limits: dict[str, Any] = {"minLength": self.least} if self.least else {}
        if self.most is not None:
            limits["maxLength"] = self.most
        return {"type": "string", **limits, **({"enum": list(self.choices)} if self.choices else {})}


@dataclass(frozen=True)
class ListOf:
    """A list of `least` to `most` items of one kind."""

    item: Kind
    most: int | None = None
    least: int = 0

    def read(self, value: Any) -> list[Any]:
        """Return a list of the checked items."""
        if not isinstance(value, list):
            raise ValueError(f"a list, each item {self._item()}")
        if len(value) < self.least or (self.most is not None and len(value) > self.most):
            raise ValueError(f"a list of {self.least} to {self.most if self.most is not None else 'more'} items")
        try:
            return [self.item.read(item) for item in value]
        except ValueError as error:
            raise ValueError(f"a list, each item {error}") from None

    def strangers(self, value: Any, path: str) -> Iterator[str]:
        """Yield the strangers of every item."""
        for index, item in enumerate(value):
            yield from self.item.strangers(item, f"{path}[{index}]")

    def _item(self) -> str:
        return str(self.item.schema().get("type", "of the right kind"))

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        limits: dict[str, Any] = {"minItems": self.least} if self.least else {}
        if self.most is not None:
            limits["maxItems"] = self.most
        return {"type": "array", "items": self.item.schema(), **limits}


@dataclass(frozen=True)
class TokenIds(Leaf):
    """A list of token ids; checked in one pass, because prompts are long."""

    least: int = 1

    def read(self, value: Any) -> list[int]:
        """Return `value`; `ValueError` unless it is a list of integers from 0."""
        if not isinstance(value, list) or len(value) < self.least or any(type(i) is not int or i < 0 for i in value):
            raise ValueError("a list of token ids (whole numbers from 0)")
        return value

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        return {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": self.least}


@dataclass(frozen=True)
class AnyOf:
    """A value of one of several kinds, tried in order."""

    kinds: tuple[Kind, ...]

    def read(self, value: Any) -> Any:
        """Return the value as the first kind that takes it."""
        expected = []
        for kind in self.kinds:
            try:
                return kind.read(value)
            except ValueError as error:
                expected.append(str(error))
        raise ValueError(", or ".join(expected))

    def strangers(self, value: Any, path: str) -> Iterator[str]:
        """Yield the strangers that the first kind that takes `value` sees in it."""
        for kind in self.kinds:
            try:
                kind.read(value)
            except ValueError:
                continue
            yield from kind.strangers(value, path)
            return

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        return {"anyOf": [kind.schema() for kind in self.kinds]}


@dataclass(frozen=True)
class Object:
    """A JSON object; `properties` describe it in the schema, `required` ones must be there.

    Others are strangers, unless nothing is described or it is `open`, because what they mean is looked at elsewhere.
    """

    properties: Mapping[str, Kind] | None = None
    required: tuple[str, ...] = ()
    open: bool = False

    def read(self, value: Any) -> dict[str, Any]:
        """Return the object; the described properties are checked, others are kept as they are, null is dropped."""
        if not isinstance(value, dict):
            raise ValueError("an object")
        found = {name: item for name, item in value.items() if item is not None}
        for name in self.required:
            if name not in found:
                raise ValueError(f"an object with {name!r}")
        for name, kind in (self.properties or {}).items():
            if name in found:
                try:
                    found[name] = kind.read(found[name])
                except ValueError as error:
                    raise ValueError(f"an object whose {name!r} is {error}") from None
        return found

    def strangers(self, value: Any, path: str) -> Iterator[str]:
        """Yield each entry that is not described and not null, with the nearest that is, and those further inside."""
        if self.properties is None:
            return
        for name, item in value.items():
            kind = self.properties.get(name)
            if item is not None and kind is not None:
                yield from kind.strangers(item, f"{path}.{name}")
            elif item is not None and not self.open:
                whole = repr(f"{path}.{name}"[:120])
                yield f"unknown field {whole} is ignored{nearest(name[:64], list(self.properties))}"

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        described: dict[str, Any] = {"type": "object"}
        if self.properties:
            described["properties"] = {name: kind.schema() for name, kind in self.properties.items()}
        if self.required:
            described["required"] = list(self.required)
        return described


@dataclass(frozen=True)
class Tagged:
    """An object of the kind that its entry `tag` names; `default` is the name where that entry is absent."""

    tag: str
    kinds: Mapping[str, Kind]
    default: str | None = None

    def read(self, value: Any) -> dict[str, Any]:
        """Return the checked object, with its tag."""
        if not isinstance(value, dict):
            raise ValueError(f"an object with {self.tag!r}")
        kind = self._kind(value)
        if kind is None:
            known = ", ".join(repr(name) for name in self.kinds)
            raise ValueError(f"an object whose {self.tag!r} is one of {known}")
        found: dict[str, Any] = kind.read({name: item for name, item in value.items() if name != self.tag})
        return {self.tag: value.get(self.tag) or self.default, **found}

    def _kind(self, value: Mapping[str, Any]) -> Kind | None:
        name = value.get(self.tag) or self.default
        return self.kinds.get(name) if isinstance(name, str) else None

    def strangers(self, value: Any, path: str) -> Iterator[str]:
        """Yield the strangers that the kind of `value` sees in it."""
        kind = self._kind(value)
        if kind is not None:
            yield from kind.strangers({name: item for name, item in value.items() if name != self.tag}, path)

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        options = []
        for name, kind in self.kinds.items():
            described = kind.schema()
            properties = {self.tag: {"const": name}, **described.get("properties", {})}
            required = [*([] if name == self.default else [self.tag]), *described.get("required", ())]
            options.append({**described, "properties": properties, **({"required": required} if required else {})})
        return {"anyOf": options}


@dataclass(frozen=True)
class Verbatim(Leaf):
    """A JSON object kept as it is, nulls included: a schema may say that something is null."""

    def read(self, value: Any) -> dict[str, Any]:
        """Return `value`."""
        if not isinstance(value, dict):
            raise ValueError("an object")
        return value

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        return {"type": "object"}


@dataclass(frozen=True)
class Anything(Leaf):
    """Any JSON value."""

    def read(self, value: Any) -> Any:
        """Return `value`."""
        return value

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        return {}
