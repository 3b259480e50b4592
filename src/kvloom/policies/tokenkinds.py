"""TokenKinds: which token ids are special and which are punctuation. Torch-free."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenKinds:
    """Two sets of token ids, made from the tokenizer."""

    special: frozenset[int]
    punctuation: frozenset[int]

    def flags(self, token_ids: Sequence[int]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return [n] bool twice: which of `token_ids` are special, and which are punctuation."""
        special = np.array([token in self.special for token in token_ids], np.bool_)
        return special, np.array([token in self.punctuation for token in token_ids], np.bool_)
