"""Log-probabilities in the two shapes of OpenAI's API, and the names of tokens in them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from kvloom.engine.request import Logprob
from kvloom.models.tokenizer import Tokenizer

LOWEST = -9999.0
"""Represents minus infinity, which JSON lacks."""

TokenLogprobs = dict[int, Logprob]


class LogprobFormat:
    """Writes log-probabilities of one model. `as_ids` names tokens `token_id:N`, `count` best ones are shown."""

    def __init__(self, tokenizer: Tokenizer, *, count: int, as_ids: bool, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._count = count
        self._as_ids = as_ids
        self._skipped = tokenizer.special_ids if skip_special else frozenset()

    def name(self, token: int) -> str:
        """Return the token's text; one that is no whole characters is `bytes:` and its bytes in hexadecimal."""
        if self._as_ids:
            return f"token_id:{token}"
        piece = self._tokenizer.spelling.piece(token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def completion(
        self, tokens: Sequence[int], logprobs: Iterable[TokenLogprobs | None], offset: int
    ) -> tuple[dict[str, Any], int]:
        """Return the `logprobs` of a text completion, and the offset in the text behind its last token.

        The first token of a prompt has no log-probability: null.
        """
        names: list[str] = []
        chosen: list[float | None] = []
        best: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token, entry in zip(tokens, logprobs, strict=True):
            name = self.name(token)
            names.append(name)
            offsets.append(offset)
            if token not in self._skipped:
                offset += len(self._tokenizer.spelling.piece(token).decode("utf-8", "replace"))
            chosen.append(None if entry is None else finite(entry[token].logprob))
            best.append(None if entry is None else self._best(entry, token))
        return {"tokens": names, "token_logprobs": chosen, "top_logprobs": best, "text_offset": offsets}, offset

    def _best(self, entry: TokenLogprobs, token: int) -> dict[str, float]:
        """Return the best tokens and the chosen one by name; of tokens with one name, the likeliest counts."""
        found: dict[str, float] = {}
        for candidate in [*self._ranked(entry), token]:
            name = self.name(candidate)
            found[name] = max(found.get(name, -math.inf), finite(entry[candidate].logprob))
        return found

    def _ranked(self, entry: TokenLogprobs) -> list[int]:
        return sorted(entry, key=lambda token: entry[token].rank)[: self._count]

    def chat(self, tokens: Sequence[int], logprobs: Iterable[TokenLogprobs]) -> dict[str, Any]:
        """Return the `logprobs` of a chat completion."""
        content = []
        for token, entry in zip(tokens, logprobs, strict=True):
            best = [self._entry(other, entry[other]) for other in self._ranked(entry)]
            content.append({**self._entry(token, entry[token]), "top_logprobs": best})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: Logprob) -> dict[str, Any]:
        piece = list(self._tokenizer.spelling.piece(token))
        return {"token": self.name(token), "logprob": finite(logprob.logprob), "bytes": piece}

    def prompt(self, entries: Iterable[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
        """Return `prompt_logprobs`: for each token of the prompt but the first, entries by token id."""
        return [None if entry is None else self._by_id(entry) for entry in entries]

    def _by_id(self, entry: TokenLogprobs) -> dict[str, Any]:
        return {
            str(token): {"logprob": finite(found.logprob), "rank": found.rank, "decoded_token": self.name(token)}
            for token, found in entry.items()
        }


def finite(value: float) -> float:
    """Return `value`, or `LOWEST` where it is lower than that."""
    return max(value, LOWEST)
