"""Occurrences: which tokens a sequence has, and how often it generated each; grows with the sequence. Torch-free."""

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray


class Occurrences:
    """The different tokens of one sequence, so that a penalty touches only them and not the whole vocabulary.

    `update` reads only new tokens: a step of a long sequence costs one token.
    """

    def __init__(self, num_prompt_tokens: int) -> None:
        """Start empty; the first `num_prompt_tokens` will not count as generated."""
        self._num_prompt_tokens = num_prompt_tokens
        self._num_read = 0
        self._places: dict[int, int] = {}
        self._tokens = np.zeros(16, np.int64)
        self._counts = np.zeros(16, np.float32)

    def update(self, token_ids: Seq[int]) -> None:
        """Read the tokens added to `token_ids` (prompt and output) since the last call; mutates self."""
        prompt = self._num_prompt_tokens
        if self._num_read < prompt:
            self._places = {token: place for place, token in enumerate(dict.fromkeys(token_ids[:prompt]))}
            self._reserve(len(self._places))
            self._tokens[: len(self._places)] = list(self._places)
            self._num_read = prompt
        for token in token_ids[self._num_read :]:
            place = self._places.setdefault(token, len(self._places))
            self._reserve(place + 1)
            self._tokens[place] = token
            self._counts[place] += 1
        self._num_read = len(token_ids)

    def _reserve(self, size: int) -> None:
        if size > len(self._tokens):
            more = max(size, 2 * len(self._tokens)) - len(self._tokens)
            self._tokens = np.concatenate([self._tokens, np.zeros(more, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(more, np.float32)])

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The different tokens [n] of prompt and output, in the order in which they came; a view."""
        return self._tokens[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of `tokens` was generated [n]; a view."""
        return self._counts[: len(self._places)]
