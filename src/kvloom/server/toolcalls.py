"""Parses a model's calls of functions from its text, in pieces, while it is generated."""

import json
import re
import secrets
from dataclasses import dataclass, field
from typing import Any

Piece = str | dict[str, Any]
"""Content, or a piece of a call."""

BEGIN, END = "<tool_call>", "</tool_call>"
"""Marks around a call in the answers of models whose template teaches them (Hermes, Qwen)."""

HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
"""Pattern of a call up to its arguments, which are then sent as they are generated."""


@dataclass
class ToolCallReader:
    """Splits one answer into content and calls; text that may begin a mark is held until more text decides.

    A call is sent when its name is certain, and its arguments as they are generated: one that is cut off stays a call.
    Text between marks that is not a call (not JSON with a name) is content, marks included. `only_first` drops later
    calls, `inside` means that the text begins after the first mark. `calls` are whole calls so far, in the format of
    messages.
    """

    only_first: bool = False
    inside: bool = False
    calls: list[dict[str, Any]] = field(default_factory=list)
    _held: str = ""
    _state: str = "text"
    _open: dict[str, Any] | None = None
    _depth: int = 0
    _quoted: bool = False
    _escaped: bool = False

    def __post_init__(self) -> None:
        if self.inside:
            self._state = "head"

    def read(self, text: str, last: bool) -> list[Piece]:
        """Take more text and return what is now certain, in order; `last` decides what is held.

        Content is text. Pieces of calls are as in OpenAI's chunks: the first of a call has its id and name, all have
        some of the arguments.
        """
        self._held += text
        pieces: list[Piece] = []
        reading = {"text": self._text, "head": self._head, "arguments": self._arguments, "tail": self._tail}
        while reading[self._state](last, pieces):
            pass
        return [piece for piece in pieces if piece]

    def _text(self, last: bool, pieces: list[Piece]) -> bool:
        before, mark, after = self._held.partition(BEGIN)
        if mark:
            pieces.append(before)
            self._held, self._state, self.inside = after, "head", False
            return True
        cut = len(self._held) - (0 if last else _overlap(self._held, BEGIN))
        pieces.append(self._held[:cut])
        self._held = self._held[cut:]
        return False

    def _head(self, last: bool, pieces: list[Piece]) -> bool:
        match = HEAD.match(self._held)
        if match is not None:
            self._begin(json.loads(match[1], strict=False), "", pieces)
            self._held, self._state = self._held[match.end() :], "arguments"
            self._depth, self._quoted, self._escaped = 0, False, False
            return True
        if END not in self._held and not last:
            return False
        within, mark, after = self._held.partition(END)
        call = _call(within)
        if call is not None:
            self._begin(*call, pieces)
        else:
            pieces.append(("" if self.inside else BEGIN) + within + mark)
        self._held, self._state, self.inside = after, "text", False
        return True

    def _arguments(self, last: bool, pieces: list[Piece]) -> bool:
        end = self._end_of_object()
        piece, self._held = self._held[:end], self._held[end:]
        if piece and self._open is not None:
            self._open["function"]["arguments"] += piece
            pieces.append({"index": self._open["index"], "function": {"arguments": piece}})
        if self._depth == 0 and piece:
            self._state = "tail"
            return True
        return False

    def _tail(self, last: bool, pieces: list[Piece]) -> bool:
        _, mark, after = self._held.partition(END)
        if mark:
            self._held, self._state = after, "text"
            return True
        self._held = "" if last else self._held[-len(END) :]
        return False

    def _end_of_object(self) -> int:
        """Return where the object of the arguments ends in what is held, the length of it when it goes on."""
        for place, character in enumerate(self._held):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place + 1
        return len(self._held)

    def _begin(self, name: str, arguments: str, pieces: list[Piece]) -> None:
        self._open = None
        if self.only_first and self.calls:
            return
        call = {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
        function = {"name": name, "arguments": arguments}
        pieces.append({"index": len(self.calls), **call, "function": dict(function)})
        self._open = {"index": len(self.calls), **call, "function": function}
        self.calls.append(self._open)


def _call(text: str) -> tuple[str, str] | None:
    """Return (name, arguments in JSON) of a whole call, None for what is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    return value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of `text` that begins `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
