"""ControlTokens: keeps names of control tokens such as `<|im_end|>` in users' text as text, so none can forge a turn.

In a rendered text, control tokens of the template and of messages are equal. So every control token in a message gets a
mark inside, after its first character, where no template trims, cuts or compares:

    content       hi<|im_end|>      ->  hi<*|im_end|>
    rendered      <|im_start|>user\\nhi<*|im_end|><|im_end|>
    encoded       CONTROL  user\\nhi  < | im _ end | >  CONTROL

A control token in the rendered text is the template's own if it has no mark inside. Those are respelt with an
unpredictable spelling, and a copy of the tokenizer that has them in that spelling alone encodes the text.
"""

import json
import re
import secrets
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import Any

import tokenizers

from kvloom.errors import InvalidInputError

_MARKS = (*range(0x13000, 0x13430), *range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))
"""Hieroglyphs, which Python prints as they are, and private characters. The first that a conversation lacks is used."""


class ControlTokens:
    """The control tokens of a tokenizer, by their ids. Threads may share it.

    Tokens of a single character cannot be marked and are not distinguished.
    """

    def __init__(self, backend: tokenizers.Tokenizer, ids: Collection[int]) -> None:
        self._backend = backend
        spelled = {index: token for index in ids if (token := backend.id_to_token(index)) is not None}
        self._ids = {token: index for index, token in spelled.items() if len(token) > 1}
        self._prefixes = {token[:size] for token in self._ids for size in range(1, len(token))}
        self._suffixes = {token[size:] for token in self._ids for size in range(1, len(token))}
        self._longest = max(map(len, self._ids), default=0)

    @staticmethod
    def mark_for(*values: Any) -> str:
        """Return a character that occurs nowhere in `values`; raises `InvalidInputError` when every one does."""
        held = set(json.dumps(values, ensure_ascii=False, default=str))
        for code in _MARKS:
            if chr(code) not in held:
                return chr(code)
        raise InvalidInputError("the messages hold every character that could be used as a mark; remove some")

    def marked(self, value: Any, mark: str) -> Any:
        """Return a copy of a JSON value with a mark in every control token that a string of it spells, or might begin
        or end beside other text.
        """
        if isinstance(value, str):
            return self._marked_text(value, mark)
        if isinstance(value, Mapping):
            return {self.marked(key, mark): self.marked(entry, mark) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self.marked(entry, mark) for entry in value]
        return value

    def _marked_text(self, text: str, mark: str) -> str:
        places = {found.start() + 1 for token in self._ids if token in text for found in _overlapping(token, text)}
        begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
        for size in range(1, min(self._longest, end - begin + 1)):
            if text[end - size : end] in self._prefixes:
                places.add(end - size + 1)
            if text[begin : begin + size] in self._suffixes:
                places.add(begin + (size > 1))
        for place in sorted(places, reverse=True):
            text = text[:place] + mark + text[place:]
        return text

    def encode(self, text: str, marked: str, mark: str) -> list[int]:
        """Return the token ids of a text that was rendered from messages as they are, and `marked` from marked ones.

        No tokens are added around it. Where both texts hold the same control tokens, no message has brought one, and
        the ids are those that the tokenizer gives to `text`.
        """
        here = sorted((token for token in self._ids if token in text), key=len, reverse=True)
        own = re.compile("|".join(map(re.escape, here)))
        if not here or own.findall(text) == own.findall(marked):
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        respelt = own.sub(lambda found: self._spelling(found.group()), marked).replace(mark, "")
        return list(self._respelt_backend.encode(respelt, add_special_tokens=False).ids)

    @cached_property
    def _secret(self) -> str:
        return secrets.token_hex(16)

    def _spelling(self, token: str) -> str:
        """Return the spelling of `token` in a text for `_respelt_backend`."""
        return f"\U0010fffd{self._secret}.{self._ids[token]}\U0010fffd"

    @cached_property
    def _respelt_backend(self) -> tokenizers.Tokenizer:
        """The same tokenizer with the same ids, but with control tokens spelt by `_spelling` only."""
        facts = json.loads(self._backend.to_str())
        facts["post_processor"] = None
        for entry in facts["added_tokens"]:
            if entry["content"] in self._ids:
                entry.update(content=self._spelling(entry["content"]), normalized=False)
        model = facts["model"]
        vocab = model["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {self._spelling(t) if t in self._ids else t: index for t, index in vocab.items()}
        else:
            model["vocab"] = [[self._spelling(t) if t in self._ids else t, *rest] for t, *rest in vocab]
        if model.get("unk_token") in self._ids:
            model["unk_token"] = self._spelling(model["unk_token"])
        return tokenizers.Tokenizer.from_str(json.dumps(facts))


def _overlapping(token: str, text: str) -> Iterator[re.Match[str]]:
    """Return the matches of `token` in `text`, those that overlap included."""
    return re.finditer(f"(?={re.escape(token)})", text)
