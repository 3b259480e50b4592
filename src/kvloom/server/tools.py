"""Tools: the functions that a conversation offers to the model, and the form of forced and strict calls."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvloom.engine.structured_params import StructuredOutputsParams
from kvloom.errors import InvalidInputError, UnsupportedError
from kvloom.server.fields import Body
from kvloom.server.refusal import bad_field
from kvloom.server.toolcalls import BEGIN, END

ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
CHOICES = ("auto", "none", "required")


@dataclass(frozen=True)
class Tools:
    """Functions that a body offers. `callable` are those that may be called, all of them unless one is named.

    `forced` means that the answer must be calls, `several` that it may be more than one.
    """

    offered: list[dict[str, Any]]
    callable: list[dict[str, Any]]
    forced: bool
    several: bool

    @property
    def bound(self) -> bool:
        """Whether calls must have a form: forced ones, and those of a strict function."""
        return self.forced or any(function.get("strict") for function in self.callable)

    def form(self, check: Callable[[StructuredOutputsParams], object], warnings: list[str]) -> StructuredOutputsParams:
        """Return the form of an answer that calls these functions; `check` raises for a form that cannot be enforced.

        Arguments follow the parameters of a function. If those cannot be enforced, a strict function is refused; the
        arguments of any other may then be any object, with a warning. Mutates `warnings`. For any thread.
        """
        rules, names = [], []
        for index, function in enumerate(self.callable):
            arguments = self._arguments(function, check, warnings)
            names.append(f"call_{index}")
            begin = f'{{"name": {json.dumps(function["name"])}, "arguments": '
            written = json.dumps({**arguments, "x-guidance": LAYOUT})
            rules.append(f"call_{index}: {json.dumps(begin)} %json {written} {json.dumps('}')}")
        call = " | ".join(names)
        end = json.dumps("\n" + END)
        if self.forced:
            more = f" ({json.dumps(chr(10) + BEGIN + chr(10))} ({call}) {end})*" if self.several else ""
            start = [f"start: ({call}) {end}{more}"]
        else:
            start = [
                "start: (section)* rest",
                "rest: TEXT",
                "TEXT: /(.|\\n)*/",
                f"begun[lazy]: TEXT {json.dumps(BEGIN)}",
                f'section: begun "\\n" ({call}) {end}',
            ]
        return StructuredOutputsParams(grammar="\n".join(["%llguidance {}", *start, *rules]))

    @staticmethod
    def _arguments(
        function: dict[str, Any], check: Callable[[StructuredOutputsParams], object], warnings: list[str]
    ) -> dict[str, Any]:
        schema = function.get("parameters") or ANY_ARGUMENTS
        if schema.get("type", "object") != "object":
            raise bad_field("tools", f"the parameters of {function['name']!r} must be an object's schema")
        schema = {"type": "object", **schema}
        try:
            check(StructuredOutputsParams(json=schema))
        except InvalidInputError as error:
            if function.get("strict"):
                raise bad_field("tools", f"the strict function {function['name']!r}: {error}") from None
            warnings.append(f"arguments of {function['name']!r} may be any object: {error}")
            return ANY_ARGUMENTS
        return schema


def offered_tools(body: Body, template: str | None) -> Tools | None:
    """Return the functions that a body offers, None when there are none.

    Raises `UnsupportedError` for a template that has no tools or teaches another form of calls, and `Refusal` for a
    `tool_choice` that cannot be followed.
    """
    given = body.get("tools")
    choice = body.get("tool_choice", "auto" if given else "none")
    named = _named(choice)
    if named is None and choice not in CHOICES:
        raise bad_field("tool_choice", "tool_choice must be 'auto', 'none', 'required' or {'type': 'function', ...}")
    if not given or choice == "none":
        if named is not None or choice == "required":
            raise bad_field("tool_choice", "tool_choice asks for a call, and there are no tools to call")
        return None
    reasons = []
    if template is None or not re.search(r"\btools\b", template):
        reasons.append("the model's chat template has no tools")
    elif BEGIN not in template:
        reasons.append(f"the chat template does not mark calls with {BEGIN}, the one form that is read")
    if not all(map(_is_function, given)):
        reasons.append("a tool must be {'type': 'function', 'function': {'name': ..., 'parameters': {...}}}")
    if reasons:
        raise UnsupportedError("tools", reasons)
    functions = [tool["function"] for tool in given]
    wanted = [function for function in functions if named in (None, function["name"])]
    if not wanted:
        known = ", ".join(function["name"] for function in functions)
        raise bad_field("tool_choice", f"tool_choice names {named!r}, which is not among the tools: {known}")
    several = named is None and body.get("parallel_tool_calls", True)
    return Tools(list(given), wanted, forced=named is not None or choice == "required", several=several)


def _named(choice: Any) -> str | None:
    function = choice.get("function") if isinstance(choice, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def _is_function(tool: dict[str, Any]) -> bool:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    return function.get("parameters") is None or isinstance(function["parameters"], dict)
