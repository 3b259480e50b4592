"""Finds the part of a JSON schema that cannot be enforced, as an RFC 6901 pointer. Torch-free."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

MAX_TRIES = 256
"""Parts of a schema that are tried one by one to find the one at fault."""

SCHEMAS = (
    "additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
LISTS = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
MAPS = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
"""Keywords whose values are a schema, a list of them, and schemas by name."""

BASES = ("$id", "id")
"""Keywords that change the base of references below them; the library reads them at the root only."""


KEYWORDS = frozenset({
    *SCHEMAS, *LISTS, *MAPS, *BASES, "$anchor", "$comment", "$dynamicAnchor", "$dynamicRef", "$recursiveAnchor",
    "$recursiveRef", "$ref", "$schema", "$vocabulary", "const", "contentEncoding", "contentMediaType", "contentSchema",
    "default", "dependencies", "dependentRequired", "deprecated", "description", "discriminator", "enum", "examples",
    "example", "exclusiveMaximum", "exclusiveMinimum", "format", "maxContains", "maxItems", "maxLength",
    "maxProperties", "maximum", "minContains", "minItems", "minLength", "minProperties", "minimum", "multipleOf",
    "pattern", "readOnly", "required", "title", "type", "uniqueItems", "writeOnly",
})  # fmt: skip
"""Keywords of the drafts, and annotations that generators of schemas add."""


def strange_keywords(schema: Any) -> Iterator[str]:
    """Yield the pointer of every unknown keyword in `schema` and its parts: misspelt, or without effect."""
    for pointer, part in everywhere(schema):
        if isinstance(part, Mapping):
            names = (str(name) for name in part if name not in KEYWORDS and not str(name).startswith("x-"))
            yield from (f"{pointer}/{escaped(name)}" for name in names)


def parts(schema: Any, pointer: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (pointer, schema) of each schema directly inside `schema`, whose pointer is `pointer`."""
    if not isinstance(schema, Mapping):
        return
    for name in SCHEMAS:
        if isinstance(schema.get(name), Mapping | bool):
            yield f"{pointer}/{name}", schema[name]
    for name in LISTS:
        if isinstance(schema.get(name), list):
            yield from ((f"{pointer}/{name}/{index}", part) for index, part in enumerate(schema[name]))
    for name in MAPS:
        if isinstance(schema.get(name), Mapping):
            yield from ((f"{pointer}/{name}/{escaped(key)}", part) for key, part in schema[name].items())


def everywhere(schema: Any, pointer: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (pointer, schema) of `schema` and of all schemas inside it."""
    yield pointer, schema
    for inner, part in parts(schema, pointer):
        yield from everywhere(part, inner)


def escaped(name: str) -> str:
    """Return a name as a part of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def fault_of(schema: Any, complaint: Callable[[Any], str]) -> tuple[str, str] | None:
    """Return (pointer, reason) of the innermost part of `schema` that cannot be enforced, None when all of it can.

    `complaint(schema)` returns the error for a schema, empty for none. A part is tried with the definitions of the
    whole, and is at fault if it gives the same error alone.
    """
    for pointer, part in everywhere(schema):
        if not isinstance(part, Mapping):
            continue
        for name in BASES:
            if pointer and isinstance(part.get(name), str):
                return f"{pointer}/{name}", "references cannot be resolved against another base inside the schema"
        if "x-guidance" in part:
            return f"{pointer}/x-guidance", "options of the grammar library are not for requests"
    reason = complaint(schema)
    if not reason:
        return None
    shared = {name: schema[name] for name in ("$defs", "definitions") if isinstance(schema, Mapping) and name in schema}
    here, at, tries = schema, "", 0
    while True:
        for pointer, part in parts(here, at):
            if not isinstance(part, Mapping):
                continue  # true and false hold no keyword, and the library takes them only inside a schema
            tries += 1
            if tries > MAX_TRIES:
                return at, reason
            if _last_line(complaint({**shared, **part})) == _last_line(reason):
                here, at = part, pointer
                break
        else:
            return _at_keyword(here, at, reason), reason


def _at_keyword(schema: Any, pointer: str, reason: str) -> str:
    """Return the pointer of the first keyword of `schema` that the reason quotes, else that of `schema` itself."""
    names = [str(name) for name in schema] if isinstance(schema, Mapping) else []
    named = (name for name in names if f'"{name}"' in reason or reason.startswith(f"{name} "))
    return next((f"{pointer}/{escaped(name)}" for name in named), pointer)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
