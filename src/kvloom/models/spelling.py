"""Spelling: the bytes that each token adds to a text, so that text can be decoded one token at a time."""

import json
import re
from functools import cache
from typing import Any

import tokenizers

from kvloom.errors import UnsupportedError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@cache
def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of byte-level BPE stands for (Radford et al. 2019).

    Printable bytes of Latin-1 stand for themselves; the others, in order, are the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


class Spelling:
    """How tokens of `backend` are spelled.

    In a *byte-level* vocabulary every token is bytes, and only a whole text need be UTF-8. Otherwise tokens are text,
    except byte tokens (`<0xE2>`) that spell out what the vocabulary lacks. `strips_space` says that a text's first
    character is dropped when it is a space. Raises `UnsupportedError` for decoders that are neither.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._pieces: dict[int, bytes] = {}
        self._bytes: set[int] = set()
        self.is_byte_level = False
        self.strips_space = False
        self._replaced: list[tuple[str, str]] = []
        self._falls_back = False
        state = backend.decoder.__getstate__() if backend.decoder is not None else b"null"
        decoder = json.loads(state)
        for step in decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder]:
            self._take(step)

    def _take(self, step: dict[str, Any] | None) -> None:
        kind = step["type"] if step else None
        if kind == "ByteLevel":
            self.is_byte_level = True
        elif step and kind == "Replace" and "String" in step["pattern"]:
            self._replaced.append((step["pattern"]["String"], step["content"]))
        elif kind == "ByteFallback":
            self._falls_back = True
        elif step and kind == "Metaspace":
            self._replaced.append((step["replacement"], " "))
            self.strips_space = step.get("prepend_scheme", "always") != "never"
        elif step and kind == "Strip" and (step["content"], step["start"], step["stop"]) == (" ", 1, 0):
            self.strips_space = True
        elif kind != "Fuse":
            raise UnsupportedError("the tokenizer", [f"its decoder is {kind or 'missing'}; text cannot be streamed"])

    def piece(self, token_id: int) -> bytes:
        """Return the bytes that the token adds; none for an id outside the vocabulary."""
        found = self._pieces.get(token_id)
        if found is None:
            found = self._pieces[token_id] = self._spell(token_id, self._backend.id_to_token(token_id) or "")
        return found

    def is_byte(self, token_id: int) -> bool:
        """Return whether the token is one byte of a character that the vocabulary lacks."""
        self.piece(token_id)
        return token_id in self._bytes

    def _spell(self, token_id: int, token: str) -> bytes:
        if self.is_byte_level:
            alphabet = byte_alphabet()
            if all(character in alphabet for character in token):
                return bytes(alphabet[character] for character in token)
            return token.encode()
        if self._falls_back and (match := _BYTE_TOKEN.fullmatch(token)):
            self._bytes.add(token_id)
            return bytes([int(match[1], 16)])
        for old, new in self._replaced:
            token = token.replace(old, new)
        return token.encode()
