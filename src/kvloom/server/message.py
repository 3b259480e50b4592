"""Message: one answer of the assistant as it is put together."""

from dataclasses import dataclass, field
from typing import Any

from kvloom.server.answer import Delta
from kvloom.server.toolcalls import Piece, ToolCallReader


@dataclass
class Message:
    """The last delta of an answer: `pieces` of content and calls in order, tokens, and finish reason.

    `reader` reads calls out of the text, None where no tools are offered; it holds the whole calls so far.
    """

    reader: ToolCallReader | None
    pieces: list[Piece] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    begun: bool = False

    def take(self, delta: Delta) -> None:
        """Replace the contents by those of `delta`; mutates self."""
        self.token_ids, self.logprobs = delta.token_ids, delta.logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        if self.reader is None:
            self.pieces = [delta.text] if delta.text else []
            return
        self.pieces = self.reader.read(delta.text, delta.finish_reason is not None)
        if self.finish_reason == "stop" and self.reader.calls:
            self.finish_reason = "tool_calls"

    @property
    def content(self) -> str:
        """The text among the pieces."""
        return "".join(piece for piece in self.pieces if isinstance(piece, str))

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The pieces of calls."""
        return [piece for piece in self.pieces if not isinstance(piece, str)]
