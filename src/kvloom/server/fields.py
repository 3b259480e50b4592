"""Fields of request bodies: tables from which they are checked, warned about, refused and documented."""

import enum
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from kvloom.registry import nearest
from kvloom.server.refusal import Refusal, bad_field
from kvloom.server.values import Anything, Kind

MAX_WARNINGS = 16


class Effect(enum.Enum):
    """How a supported field is handled."""

    USED = "used"
    NONE = "none"  # informational for other servers; cannot change the answer
    WARNED = "warned"  # an option that is ignored and does not change the answer
    REFUSED = "refused"  # would change the answer and is not supported


@dataclass(frozen=True)
class Field:
    """One field of a body; `neutral` values of a refused or warned field ask for nothing and pass."""

    name: str
    kind: Kind
    doc: str
    effect: Effect = Effect.USED
    neutral: tuple[Any, ...] = ()
    required: bool = False


@dataclass(frozen=True)
class Body:
    """The checked fields of a request, without those that were null, and the warnings about them."""

    values: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str, default: Any = None) -> Any:
        """Return the field's value, or `default` when it was absent or null."""
        return self.values.get(name, default)


def table(*entries: Field) -> dict[str, Field]:
    """Return `entries` by name."""
    return {entry.name: entry for entry in entries}


def unneeded(name: str, doc: str) -> Field:
    """Return a field that is informational for other servers and cannot change the answer."""
    return Field(name, Anything(), doc, Effect.NONE)


def warned(name: str, doc: str, *neutral: Any) -> Field:
    """Return a field that is ignored and does not change the answer."""
    return Field(name, Anything(), doc, Effect.WARNED, neutral)


def refused(name: str, doc: str, *neutral: Any) -> Field:
    """Return a field that would change the answer and is not supported."""
    return Field(name, Anything(), doc, Effect.REFUSED, neutral)


def read_body(raw: Any, known: Mapping[str, Field]) -> Body:
    """Return the checked fields of `raw`; raises `Refusal` 400 naming the field at fault.

    A field that `known` lacks, and one that is known and ignored, gives a warning.
    """
    if not isinstance(raw, dict):
        raise Refusal(400, f"the body is a JSON {type(raw).__name__}, expected an object")
    body = Body({})
    further = raw.get("vllm_xargs")
    if isinstance(further, dict) and "vllm_xargs" in known:
        raw = {**further, **raw}
    for name, value in raw.items():
        entry = known.get(name)
        if value is None or (entry is None and len(body.warnings) >= MAX_WARNINGS):
            continue
        if entry is None:
            body.warnings.append(f"unknown field {_short(name)} is ignored{nearest(name[:64], list(known))}")
        elif entry.effect is Effect.WARNED and not any(value == neutral for neutral in entry.neutral):
            body.warnings.append(f"field {name!r} has no effect here: {entry.doc}")
        elif entry.effect is Effect.REFUSED and not any(value == neutral for neutral in entry.neutral):
            raise bad_field(name, f"{name} is not supported: {entry.doc} Leave it out", "unsupported_field")
        elif entry.effect is Effect.USED:
            try:
                body.values[name] = entry.kind.read(value)
            except ValueError as error:
                raise bad_field(name, f"{name} is {_short(value)}; it must be {error}") from None
            room = max(0, MAX_WARNINGS - len(body.warnings))
            body.warnings.extend(islice(entry.kind.strangers(value, name), room))
    for name, entry in known.items():
        if entry.required and name not in body:
            raise bad_field(name, f"the body has no {name!r}", "missing_field")
    return body


def _short(value: Any) -> str:
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = 80
    return shortened.repr(value)
