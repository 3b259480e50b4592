"""Tools: which templates can offer functions to the model, and reading its calls out of the text as it comes."""

import json
import re
import secrets
from dataclasses import dataclass, field
from typing import Any

from kvloom.errors import UnsupportedError
from kvloom.server.fields import Body
from kvloom.server.refusal import bad_field

BEGIN, END = "<tool_call>", "</tool_call>"
"""Marks around a call in the answers of models whose template teaches them (Hermes, Qwen)."""


def offered_tools(body: Body, template: str | None) -> list[dict[str, Any]] | None:
    """Return the tools for the template, None when none are offered.

    Raises `UnsupportedError` for a template that has no tools or teaches another form of calls, and `Refusal` for a
    `tool_choice` that would bind the answer.
    """
    tools = body.get("tools")
    choice = body.get("tool_choice", "auto" if tools else "none")
    if choice not in ("auto", "none"):
        raise bad_field("tool_choice", "tool_choice must be 'auto' or 'none': answers cannot be forced to be calls")
    if not tools or choice == "none":
        return None
    reasons = []
    if template is None or not re.search(r"\btools\b", template):
        reasons.append("the model's chat template has no tools")
    elif BEGIN not in template:
        reasons.append(f"the chat template does not mark calls with {BEGIN}, the one form that is read")
    if any(tool.get("type") != "function" or not isinstance(tool.get("function"), dict) for tool in tools):
        reasons.append("a tool must be {'type': 'function', 'function': {...}}")
    if reasons:
        raise UnsupportedError("tools", reasons)
    return list(tools)


@dataclass
class ToolCallReader:
    """Splits one answer into content and calls; what may begin a mark is held until more text decides.

    What stands between marks and is no call (not JSON with a name) is content, marks included. `only_first` drops
    later calls.
    """

    only_first: bool = False
    calls: list[dict[str, Any]] = field(default_factory=list)
    _held: str = ""

    def read(self, text: str, last: bool) -> tuple[str, list[dict[str, Any]]]:
        """Take more text and return (content, calls) that are now certain; `last` decides what is held."""
        self._held += text
        content: list[str] = []
        found: list[dict[str, Any]] = []
        while BEGIN in self._held:
            before, _, rest = self._held.partition(BEGIN)
            inside, mark, after = rest.partition(END)
            if not mark and not last:
                content.append(before)
                self._held = BEGIN + rest
                return "".join(content), found
            content.append(before)
            call = self._call(inside)
            if call is None:
                content.append(BEGIN + inside + mark)
            elif not (self.only_first and self.calls):
                self.calls.append(call)
                found.append(call)
            self._held = after
        keep = 0 if last else _overlap(self._held, BEGIN)
        cut = len(self._held) - keep
        content.append(self._held[:cut])
        self._held = self._held[cut:]
        return "".join(content), found

    def _call(self, text: str) -> dict[str, Any] | None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        index = len(self.calls)
        return {
            "index": index,
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": value["name"], "arguments": written},
        }


def _overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of `text` that begins `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
