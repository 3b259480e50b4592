"""Encoding: the store of one sequence at work. It says which blocks are due, and what admission has to count.

    lane   | native sinks | encoded ..... done | due ...... last | residual | open block |

Blocks are due once the prompt is complete and as soon as `residual` tokens are behind them. Lanes with a window stay
native.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kvloom.cache.lanes import LaneTable
from kvloom.cache.prefix import PrefixChain
from kvloom.spec.footprint import request_footprint
from kvloom.spec.kv import KVSpec
from kvloom.spec.lanestore import COLUMNS_AT_ONCE, lane_store
from kvloom.spec.policy import PolicySpec, Term
from kvloom.spec.store import STORES

Ints = NDArray[np.int64]


class Encoding:
    """`store` on one sequence. `chain` names its encoded blocks in the prefix index, `num_published` of them so far.

    `lanes` [n] are those that it encodes and `done` [n] the column up to which each is encoded. `cached_tokens` came
    encoded from the prefix index.
    """

    def __init__(self, store: Term, lanes: LaneTable, prompt_tokens: int, salt: str) -> None:
        """Plan for a prompt of `prompt_tokens`; requests of another `salt` or store share no encoded block."""
        self.store = store
        self.table = lanes
        self.prompt_tokens = prompt_tokens
        self.residual = store.number("residual")
        self.sinks = -(-store.number("sinks") // lanes.spec.block_size)
        whole = [lane for group in lanes.spec.groups if group.window is None for lane in group.lanes]
        self.lanes: Ints = np.array(whole, np.int64)
        spec, native = lanes.spec, STORES.get(lanes.spec.store)
        widths = [(spec.block_size, lane.k_width, lane.v_width) for lane in spec.lane_set]
        self._elements = np.array([size * (k + v) for size, k, v in widths], np.int64)  # of a block of each lane
        self._native_bits = native.bits
        smaller = [native.payload_bytes(*block) - STORES.get(store.name).payload_bytes(*block) for block in widths]
        self._saved = np.array(smaller, np.int64)[self.lanes]  # bytes of an encoded block's payload
        self.chain = PrefixChain(f"{salt}\0{store.name}{store.args}")
        self.restart()

    def __str__(self) -> str:
        return str(PolicySpec(store=self.store))

    def restart(self) -> None:
        """Discard what is known: the sequence has no blocks, and is computed again from its tokens."""
        self.done: Ints = np.full(len(self.lanes), self.sinks, np.int64)
        self.num_published = 0
        self.cached_tokens = 0
        self._quiet_until = self.prompt_tokens  # tokens seen before which no block is due

    def fork(self) -> "Encoding":
        """Return an independent copy for a forked sequence."""
        other = Encoding(self.store, self.table, self.prompt_tokens, "")
        other.chain = PrefixChain(self.chain.salt, list(self.chain.digests))
        other.done = self.done.copy()
        other.num_published, other.cached_tokens = self.num_published, self.cached_tokens
        return other

    # ---- replay -----------------------------------------------------------------------------------------------------

    @property
    def replayable(self) -> bool:
        """Whether the sequence can be computed again with the same result: nothing came encoded from the index."""
        return not self.cached_tokens

    def next_boundary(self, seen: int) -> int:
        """Return the number of tokens after which blocks may be due next; a step goes no further."""
        return max(seen + 1, self._quiet_until)

    # ---- acting ---------------------------------------------------------------------------------------------------

    def usable_prefix(self, num_tokens: int) -> int:
        """Return how many of `num_tokens` tokens may come encoded from the prefix index: none in a replay.

        A generated token has read the last `residual` tokens before it in 16 bit, and so it must again.
        """
        return 0 if num_tokens > self.prompt_tokens else max(0, num_tokens - self.residual)

    def adopt(self, row: int, num_blocks: int) -> None:
        """Note that the sequence starts with `num_blocks` blocks of its chain; mutates the lane table."""
        self.num_published = num_blocks
        self.cached_tokens = num_blocks * self.table.spec.block_size
        if num_blocks > self.sinks:
            for lane in self.lanes.tolist():
                self.table.segments.encode(row, lane, self.store.name, self.sinks, num_blocks)
            self.table.note_loss(row)
            self.done[:] = num_blocks

    def due(self, row: int) -> list[tuple[Ints, Ints, Ints]]:
        """Return (lanes, first, last) of the columns to encode now, a few at a time, in order; mutates `done`.

        What is returned must be encoded.
        """
        seen = int(self.table.seen[row])
        if seen < self._quiet_until:
            return []
        size = self.table.spec.block_size
        end = (self.table.begin[row, self.lanes] + self.table.held[row, self.lanes]).astype(np.int64)
        last = np.maximum(self.done, (end - self.residual) // size)
        found = []
        while (self.done < last).any():
            stop = np.minimum(last, self.done[self.done < last].min() + COLUMNS_AT_ONCE)
            chosen = self.done < stop
            found.append((self.lanes[chosen], self.done[chosen], stop[chosen]))
            self.done = np.maximum(self.done, stop)
        self._quiet_until = seen + max(1, int(((self.done + 1) * size + self.residual - end).min()))
        return found

    # ---- bytes --------------------------------------------------------------------------------------------------

    def bits_per_element(self, row: int) -> float:
        """Return the bits per element of K and V of the blocks that the sequence has, scales included."""
        elements = int(((self.table.table[row] >= 0).sum(axis=1) * self._elements).sum())
        saved = int(((self.done - self.sinks) * self._saved).sum())
        return self._native_bits - 8 * saved / max(1, elements)

    def peak_bytes(self, num_tokens: int, chunk: int, sequences: int = 1) -> int:
        """Return the most arena bytes of the request on its way to `num_tokens`, in chunks of `chunk` tokens."""
        prompt = min(num_tokens, self.prompt_tokens)
        return encoded_peak(self.table.spec, self.store, prompt, num_tokens - prompt, chunk, sequences)

    def future_bytes(self, row: int, num_tokens: int) -> int:
        """Return the most bytes of one sequence on its way to `num_tokens`, its prompt being complete."""
        return max(encoded_future(self.table.spec, self.store, num_tokens), self.table.sequence_bytes(row))


@lru_cache(maxsize=1024)
def encoded_peak(kv: KVSpec, store: Term, prompt: int, output: int, chunk: int, sequences: int) -> int:
    """Return the most arena bytes of a request of `prompt` + `output` tokens that loses nothing but by `store`."""
    return request_footprint(kv, PolicySpec(store=store), prompt, output, chunk).peak_of(sequences)


@lru_cache(maxsize=1024)
def encoded_future(kv: KVSpec, store: Term, num_tokens: int) -> int:
    """Return the most arena bytes of such a sequence from the end of its prompt on, up to `num_tokens` tokens."""
    found = 0
    for group in kv.groups:
        lane = lane_store(kv, group, PolicySpec(store=store)).peak(0, num_tokens)
        if group.window is not None:
            lane = kv.lane_blocks(num_tokens, group.window) * group.block_bytes
        found += len(group.lanes) * lane
    return found
