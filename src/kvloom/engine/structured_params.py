"""StructuredOutputsParams: the form that an answer must have; names and meanings as in vLLM. Torch-free."""

import json as jsonlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvloom.errors import InvalidInputError

KINDS = ("json", "regex", "choice", "grammar", "json_object")

MAX_FORM_CHARS = 1 << 16
MAX_FORM_DEPTH = 64
"""Longest text of a form, and its deepest nesting of brackets: compilers recurse, and clients are not trusted."""


@dataclass(frozen=True)
class StructuredOutputsParams:
    """Exactly one of these; checked on construction (`InvalidInputError`).

    `json` is a JSON schema (an object, or its text), `regex` a regular expression, `choice` a list of strings,
    `grammar` a GBNF grammar whose start is `root`, `json_object` asks for any JSON object. JSON is written without
    optional white space unless `any_whitespace`, with which small models may generate blanks without end. There are
    no line breaks in either case.
    """

    json: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool = False
    any_whitespace: bool = False

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) not in (None, False)]
        if len(given) != 1:
            raise InvalidInputError(f"structured outputs take exactly one of {', '.join(KINDS)}; got {given or 'none'}")
        for kind in ("regex", "grammar"):
            if getattr(self, kind) is not None and not isinstance(getattr(self, kind), str):
                raise InvalidInputError(f"structured outputs: {kind} must be text, not {getattr(self, kind)!r}")
        if self.choice is not None:
            object.__setattr__(self, "choice", tuple(self.choice))
            if not self.choice or any(not isinstance(c, str) or not c for c in self.choice):
                raise InvalidInputError(f"structured outputs: choice must be non-empty strings, not {self.choice!r}")
        if self.json is not None:
            self._check_schema(self.json)
        if len(self.text) > MAX_FORM_CHARS:
            raise InvalidInputError(
                f"structured outputs: {self.kind} has {len(self.text)} characters; at most {MAX_FORM_CHARS} are read"
            )
        if (depth := _depth(self.text)) > MAX_FORM_DEPTH:
            raise InvalidInputError(
                f"structured outputs: {self.kind} is nested {depth} brackets deep; at most {MAX_FORM_DEPTH} are read"
            )

    @staticmethod
    def _check_schema(schema: Mapping[str, Any] | str) -> None:
        try:
            found = jsonlib.loads(schema) if isinstance(schema, str) else schema
        except ValueError as error:
            raise InvalidInputError(f"structured outputs: json is not JSON: {error}") from error
        if not isinstance(found, Mapping | bool):
            raise InvalidInputError(f"structured outputs: json must be a JSON schema, not {type(found).__name__}")

    @property
    def kind(self) -> str:
        """Which of `KINDS` is given."""
        return next(kind for kind in KINDS if getattr(self, kind) not in (None, False))

    @property
    def text(self) -> str:
        """What is given, as text: the schema, expression, grammar, or the choices as JSON."""
        value = getattr(self, self.kind)
        if isinstance(value, str):
            return value
        return jsonlib.dumps(value if not isinstance(value, Mapping) else dict(value))


def _depth(text: str) -> int:
    """Return the depth of nested brackets, inside strings too; surplus closing brackets are ignored."""
    depth = most = 0
    for character in text:
        if character in "([{":
            depth += 1
            most = max(most, depth)
        elif character in ")]}" and depth:
            depth -= 1
    return most
