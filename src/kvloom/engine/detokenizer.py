"""IncrementalDetokenizer: the text of a sequence as its tokens come, each character final when it is given out."""

import codecs
from collections.abc import Sequence

from kvloom.engine.stops import StopStrings
from kvloom.models.tokenizer import Tokenizer

_MAX_CHARACTER_BYTES = 4


class IncrementalDetokenizer:
    """Text of one output sequence, ended by the first stop string.

    Emitted text never changes::

        emitted text | may begin a stop string | bytes of an unfinished character
        ------------- text() ------------------------------------------------------> tokens

    The last two are held until more tokens decide, or `finish` is called. The concatenated deltas equal the text that
    decoding prompt and output at once adds to the decoded prompt. The one exception is a run of byte tokens that
    becomes invalid after it spelled whole characters, which stay. The cost of a token does not depend on earlier ones.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        stop: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """Start after the prompt. A stop string counts from the token number `min_tokens` on that completes it."""
        self._spelling = tokenizer.spelling
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._stops = StopStrings(stop) if stop else None
        self._num_tokens = 0
        self._parts: list[str] = []
        self._held = ""
        self.stop_hit: str | None = None
        """The stop string that ended the text, if one did."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = b""
        self._run_is_bad = False
        self._at_start = self._spelling.strips_space
        self._read_prompt(prompt_token_ids)

    def _read_prompt(self, prompt: Sequence[int]) -> None:
        """Take over the state at the end of the prompt: an unfinished character, or the start of a text."""
        if self._at_start:
            self._at_start = not any(token not in self._skipped and self._spelling.piece(token) for token in prompt)
        num_bytes, first = 0, len(prompt)
        while first and num_bytes < _MAX_CHARACTER_BYTES:
            first -= 1
            if prompt[first] not in self._skipped:
                num_bytes += len(self._spelling.piece(prompt[first]))
        for token in prompt[first:]:
            self._spell(token)

    @property
    def text(self) -> str:
        """All text emitted so far; it only grows."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def append(self, token_id: int) -> str:
        """Take the next token and return the text that is now certain; nothing more after a stop string."""
        if self.stop_hit is not None:
            return ""
        self._num_tokens += 1
        return self._emit(self._read(self._spell(token_id)))

    def finish(self) -> str:
        """Return the held text, as no token follows; unfinished characters become U+FFFD."""
        if self.stop_hit is not None:
            return ""
        rest = self._end_run() if not self._spelling.is_byte_level else self._decoder.decode(b"", final=True)
        delta = self._read(rest)
        if self.stop_hit is None:
            delta, self._held = delta + self._held, ""
        return self._emit(delta)

    def _emit(self, delta: str) -> str:
        if delta:
            self._parts.append(delta)
        return delta

    def _spell(self, token: int) -> str:
        """Return the characters that `token` completes."""
        if token in self._skipped:
            return ""
        piece = self._spelling.piece(token)
        if self._spelling.is_byte_level:
            return self._decoder.decode(piece)
        if self._spelling.is_byte(token):
            return self._spell_byte(piece)
        text = self._end_run() + piece.decode("utf-8", "replace")
        if self._at_start and text:
            self._at_start = False
            text = text.removeprefix(" ")
        return text

    def _spell_byte(self, piece: bytes) -> str:
        """Return the character that a byte token completes; once a run of them is invalid, each is one U+FFFD."""
        self._at_start = False
        if self._run_is_bad:
            return "\ufffd"
        self._run += piece
        try:
            text = codecs.utf_8_decode(self._run, "strict", False)[0]
        except UnicodeDecodeError:
            self._run_is_bad = True
            text = "\ufffd" * len(self._run)
        if text:
            self._run = b""
        return text

    def _end_run(self) -> str:
        rest, self._run, self._run_is_bad = "\ufffd" * len(self._run), b"", False
        return rest

    def _read(self, text: str) -> str:
        """Search stop strings in `text`, which follows the held text; return what is certain and hold the rest."""
        if self._stops is None:
            return text
        counts = self._num_tokens >= self._min_tokens
        for index, character in enumerate(text):
            stop = self._stops.read(character)
            if stop is not None and counts:
                self.stop_hit = stop
                known = self._held + text[: index + 1]
                self._held = ""
                return known if self._include_stop else known[: len(known) - len(stop)]
        known = self._held + text
        certain = len(known) - self._stops.num_undecided
        self._held = known[certain:]
        return known[:certain]
