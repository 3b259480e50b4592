"""Parts: an answer as a list of texts and calls, in the order in which the model writes them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvloom.server.toolcalls import Piece


@dataclass
class Part:
    """A stretch of text, or one call, whose arguments are the text; `call_id` and `name` are those of a call."""

    index: int
    text: str = ""
    call_id: str | None = None
    name: str = ""
    ended: bool = False


@dataclass(frozen=True)
class Growth:
    """A change of a part: it `began`, gained `more` text, or ended."""

    part: Part
    more: str = ""
    began: bool = False


@dataclass
class Parts:
    """The parts of one answer so far. Blank text beside calls is no part."""

    all: list[Part] = field(default_factory=list)
    _blank: str = ""

    def take(self, pieces: Sequence[Piece], last: bool) -> list[Growth]:
        """Add pieces and return the changes, in order; `last` ends the last part. Mutates self."""
        return list(self._changes(pieces, last))

    def _changes(self, pieces: Sequence[Piece], last: bool) -> Iterator[Growth]:
        for piece in pieces:
            if isinstance(piece, str):
                yield from self._text(piece)
            else:
                self._blank = ""
                if "id" in piece:
                    yield from self._begin(Part(len(self.all), "", piece["id"], piece["function"]["name"]))
                yield from self._grow(piece["function"]["arguments"])
        if last:
            if self._blank and not self.all:
                yield from self._begin(Part(0))
                yield from self._grow(self._blank)
            yield from self._end()

    def _text(self, piece: str) -> Iterator[Growth]:
        self._blank += piece
        in_text = bool(self.all) and self.all[-1].call_id is None
        if in_text or self._blank.strip():
            piece, self._blank = self._blank, ""
            if not in_text:
                yield from self._begin(Part(len(self.all)))
            yield from self._grow(piece)

    def _begin(self, part: Part) -> Iterator[Growth]:
        yield from self._end()
        self.all.append(part)
        yield Growth(part, began=True)

    def _grow(self, more: str) -> Iterator[Growth]:
        if more:
            self.all[-1].text += more
            yield Growth(self.all[-1], more)

    def _end(self) -> Iterator[Growth]:
        if self.all and not self.all[-1].ended:
            self.all[-1].ended = True
            yield Growth(self.all[-1])
