"""The form of a body's answers: `response_format`, `structured_outputs`, or an older `guided_*` field."""

from collections.abc import Callable, Mapping
from typing import Any

from kvloom.engine.structured_params import StructuredOutputsParams
from kvloom.engine.structured_schema import strange_keywords
from kvloom.errors import InvalidInputError
from kvloom.server.fields import Body
from kvloom.server.refusal import bad_field

GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""Older fields, and what each is called in `structured_outputs`."""

KINDS = frozenset({"json", "regex", "choice", "grammar", "json_object"})
TOLERATED = frozenset({"disable_fallback", "backend"})
"""Entries of `structured_outputs` that choose between backends of other servers and change nothing here."""


def read_form(body: Body) -> StructuredOutputsParams | None:
    """Return the form that the answers must have, None for free text.

    Raises `Refusal` naming the field for a form that is malformed, not supported, or asked for twice.
    """
    readers: dict[str, Callable[[Any], dict[str, Any] | None]] = {
        "response_format": _of_response_format,
        "structured_outputs": _of_structured_outputs,
        **{name: _of_guided(kind) for name, kind in GUIDED.items()},
    }
    found: dict[str, dict[str, Any]] = {}
    for name, read in readers.items():
        options = read(body.get(name)) if name in body else None
        if options is not None:
            found[name] = options
    if not found:
        return None
    name, options = found.popitem()
    if isinstance(options.get("json"), Mapping):
        strange = [f"{pointer} of its schema" for pointer in strange_keywords(options["json"])]
        body.warnings.extend(f"{name}: {what} is no keyword of JSON schemas and binds nothing" for what in strange[:4])
    if found:
        raise bad_field(name, f"{name} and {', '.join(found)} each ask for a form of the answer; send one of them")
    try:
        return StructuredOutputsParams(**options)
    except InvalidInputError as error:
        raise bad_field(name, str(error)) from None
    except RecursionError:
        raise bad_field(name, f"{name} is nested too deeply") from None


def _of_response_format(value: dict[str, Any]) -> dict[str, Any] | None:
    kind = value.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind != "json_schema":
        raise bad_field("response_format", f"response_format {kind!r}: known are text, json_object and json_schema")
    wrapped = value.get("json_schema")
    schema = wrapped.get("schema", wrapped.get("json_schema")) if isinstance(wrapped, dict) else None
    if not isinstance(schema, dict | bool):
        raise bad_field("response_format", "response_format json_schema needs json_schema: {name, schema: {...}}")
    return {"json": schema}


def _of_structured_outputs(value: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, entry in value.items():
        if name in KINDS:
            options[name] = entry
        elif name == "disable_any_whitespace":
            options["any_whitespace"] = entry is False
        elif name not in TOLERATED and entry not in (None, False):
            known = ", ".join(sorted(KINDS | {"disable_any_whitespace"}))
            raise bad_field("structured_outputs", f"structured_outputs.{name} is not supported; known: {known}")
    return options


def _of_guided(kind: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {kind: value}
