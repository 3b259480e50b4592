"""Facts of a tokenizer for cache policies: kinds of tokens, and the instruction to repeat the context."""

import unicodedata
from collections.abc import Sequence as Seq

from kvloom.models.tokenizer import Tokenizer
from kvloom.policies.tokenkinds import TokenKinds

WHOLE = "Repeat the previous context exactly."
PART = "Repeat the part of the previous context exactly, starting with"
MARK = "kvloom-mark"


class TokenFacts:
    """Facts of one tokenizer, each computed on first use."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._kinds: TokenKinds | None = None
        self._suffix: list[int] | None = None

    def kinds(self) -> TokenKinds:
        """Return the special tokens, and those whose text is punctuation and nothing else but blanks."""
        if self._kinds is None:
            special = self.tokenizer.special_ids
            pieces = {token: self.tokenizer.spelling.piece(token) for token in range(self.tokenizer.vocab_size)}
            marks = frozenset(t for t, piece in pieces.items() if t not in special and _is_punctuation(piece))
            self._kinds = TokenKinds(special, marks)
        return self._kinds

    def replay_instruction(self, hint: Seq[int]) -> list[int]:
        """Return the tokens that ask to repeat the text, from the tokens `hint` on ([]: from its start).

        The text that a chat template puts between question and answer follows; a line break without a template.
        """
        asked = self.tokenizer.encode(f"\n\n{PART if hint else WHOLE}", add_special_tokens=False)
        if self._suffix is None:
            self._suffix = self.tokenizer.encode(self._turn(), add_special_tokens=False)
        return [*asked, *hint, *self._suffix]

    def _turn(self) -> str:
        if not self.tokenizer.has_chat_template:
            return "\n"
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": MARK}])
        return text.rpartition(MARK)[2] or "\n"


def _is_punctuation(piece: bytes) -> bool:
    text = piece.decode("utf-8", "replace").strip()
    return bool(text) and all(unicodedata.category(character).startswith("P") for character in text)
