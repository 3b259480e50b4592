"""AttentionBatch: which tokens of which sequences one step processes. It carries all state of the call."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class AttentionBatch:
    """T packed tokens of B sequences; their slots exist already (`LaneTable.extend`), their K and V do not.

    All are int32 arrays, so that any device or language can take them.

    token_ids     [T]
    positions     [T]      index of each token in its sequence, by which rope rotates
    sequences     [B]      row sets of the lane table
    cu_seqlens_q  [B + 1]  tokens cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1 belong to sequence b
    length_class  [B]      which frequencies each sequence is rotated by, for models whose rotary embedding depends on
                           the length (`RopeConfig.length_class`); None: those of short texts

    `begin` and `held` of every lane are read from the lane table, the new tokens included.
    """

    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    sequences: NDArray[np.int32]
    cu_seqlens_q: NDArray[np.int32]
    length_class: NDArray[np.int32] | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.cu_seqlens_q[-1])

    def spans(self) -> list[tuple[int, int, int]]:
        """Return (sequence, first token, last token + 1) of every sequence in the batch."""
        bounds = self.cu_seqlens_q.tolist()
        return list(zip(self.sequences.tolist(), bounds[:-1], bounds[1:], strict=True))
