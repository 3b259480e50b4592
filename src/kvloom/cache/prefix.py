"""PrefixIndex: finds the blocks of a prompt's beginning that some request has computed before. Torch-free.

The key of a block is a chained hash: digest(b) = blake2b(digest(b - 1), tokens of block b), digest(-1) = blake2b(salt).
It depends on nothing else, so it is the same after a restart. An entry has one reference on each block that it lists
and records the lane groups that it still has: a windowed layer needs only the end of a prefix, and any group of any
entry may be reclaimed separately.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvloom.cache.arena import Addresses, Arena
from kvloom.spec.kv import KVSpec


@dataclass
class PrefixEntry:
    """One block of tokens of one prefix: the lanes' blocks by group, None where they were reclaimed."""

    tokens: tuple[int, ...]
    parent: bytes
    blocks: list[Addresses | None]


@dataclass(frozen=True)
class PrefixMatch:
    """The longest usable beginning of a prompt: `num_blocks` blocks, by `digests`."""

    num_blocks: int
    digests: tuple[bytes, ...]


@dataclass
class PrefixChain:
    """Digests of the full blocks of one token sequence, extended as the sequence grows."""

    salt: str = ""
    digests: list[bytes] = field(default_factory=list)

    def extend(self, tokens: Sequence[int], block_size: int, num_blocks: int) -> None:
        """Add the digests of blocks up to `num_blocks`; mutates the chain."""
        parent = self.digests[-1] if self.digests else root_digest(self.salt)
        for block in range(len(self.digests), num_blocks):
            parent = block_digest(parent, tokens[block * block_size : (block + 1) * block_size])
            self.digests.append(parent)

    def parent(self, block: int) -> bytes:
        """Return the digest that block number `block` is chained to."""
        return self.digests[block - 1] if block else root_digest(self.salt)


def root_digest(salt: str) -> bytes:
    """Return the parent digest of the first block of every prefix with this salt."""
    return hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16, person=b"kvloom-prefix").digest()


def block_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Return the chained digest of one block of token ids."""
    return hashlib.blake2b(parent + np.asarray(tokens, "<i8").tobytes(), digest_size=16).digest()


class PrefixIndex:
    """Entries in order of their last use, oldest first; all methods are exact, never probabilistic."""

    def __init__(self, spec: KVSpec, arena: Arena) -> None:
        self.spec = spec
        self.arena = arena
        self._entries: OrderedDict[bytes, PrefixEntry] = OrderedDict()
        self.num_reclaimed = 0

    def __len__(self) -> int:
        return len(self._entries)

    def match(self, tokens: Sequence[int], chain: PrefixChain, max_tokens: int) -> PrefixMatch:
        """Return the longest beginning of `tokens`, of at most `max_tokens`, of which every needed block is here.

        With m matched blocks of P tokens, the next query sits at position m*P. A lane without a window needs all
        blocks; a windowed lane only those that reach into the window behind that query::

            0 ....... | m*P - (window - 1) ........ | m*P
            may be gone   must be here                next query
        """
        size = self.spec.block_size
        limit = max_tokens // size
        chain.extend(tokens, size, limit)
        groups = self.spec.groups
        runs = [0] * len(groups)  # blocks present without a gap, ending at the current one
        best = 0
        for block in range(limit):
            entry = self._entries.get(chain.digests[block])
            if entry is not None:
                expected = tuple(tokens[block * size : (block + 1) * size])
                if entry.tokens != expected or entry.parent != chain.parent(block):
                    entry = None  # a collision of digests is a miss, never a wrong answer
            usable = True
            for index, group in enumerate(groups):
                there = entry is not None and entry.blocks[index] is not None
                runs[index] = runs[index] + 1 if there else 0
                needed = block + 1
                if group.window is not None:
                    needed -= max(0, (block + 1) * size - (group.window - 1)) // size
                elif not there:
                    return PrefixMatch(best, tuple(chain.digests[:best]))
                usable &= runs[index] >= needed
            if usable:
                best = block + 1
        return PrefixMatch(best, tuple(chain.digests[:best]))

    def blocks(self, digest: bytes, group: int) -> Addresses | None:
        """Return the blocks of one group of one entry, in the order of the group's lanes."""
        return self._entries[digest].blocks[group]

    def touch(self, digests: Sequence[bytes]) -> None:
        """Mark entries as just used; the first of `digests` becomes newest, so ends of prefixes are reclaimed first."""
        for digest in reversed(digests):
            if digest in self._entries:
                self._entries.move_to_end(digest)

    def publish(self, chain: PrefixChain, block: int, tokens: Sequence[int], blocks: list[Addresses | None]) -> None:
        """Enter block number `block` of a prefix; takes a reference on each address that was not here before."""
        digest = chain.digests[block]
        entry = self._entries.get(digest)
        if entry is None:
            if all(b is None for b in blocks):
                return
            entry = PrefixEntry(tuple(tokens), chain.parent(block), [None] * len(blocks))
            self._entries[digest] = entry
        elif entry.tokens != tuple(tokens) or entry.parent != chain.parent(block):
            return
        self._entries.move_to_end(digest)
        for index, addresses in enumerate(blocks):
            if addresses is not None and entry.blocks[index] is None:
                self.arena.share(addresses)
                entry.blocks[index] = addresses.copy()

    def reclaim(self) -> Iterator[int]:
        """Free idle blocks one group at a time, least recently used first; yields the bytes freed each time.

        A block of which a request reads every lane is skipped, and counts as just used. Where the request reads only
        some lanes after an eviction, the blocks of the others are freed and those become the request's own.
        """
        for digest in list(self._entries):
            entry = self._entries[digest]
            busy = False
            for index, addresses in enumerate(entry.blocks):
                if addresses is None:
                    continue
                if (self.arena.references(addresses) > 1).all():
                    busy = True
                    continue
                entry.blocks[index] = None
                self.num_reclaimed += len(addresses)
                if all(b is None for b in entry.blocks):
                    del self._entries[digest]  # now: the caller may stop after any step
                yield self.arena.release(addresses)
            if busy:
                self._entries.move_to_end(digest)

    def rename(self, renamed: Addresses) -> None:
        """Update the addresses of blocks that moved: `renamed[cell]` is the new address, or -1 where nothing moved."""
        for entry in self._entries.values():
            for addresses in entry.blocks:
                if addresses is not None:
                    new = renamed[self.arena.cell_of(addresses)]
                    np.copyto(addresses, new, where=new >= 0)

    def drop(self, digests: Sequence[bytes]) -> None:
        """Remove entries and the index's references on their blocks; unknown digests are skipped."""
        for digest in digests:
            entry = self._entries.pop(digest, None)
            for addresses in entry.blocks if entry is not None else ():
                if addresses is not None:
                    self.arena.release(addresses)

    def drop_copies(self, addresses: Addresses, digests: Sequence[bytes] | None = None) -> None:
        """Drop the groups of entries `digests` (None: all) with a block among `addresses` without another owner."""
        held = addresses[self.arena.references(addresses) == 1]
        if not len(held):
            return
        marked = np.zeros(len(self.arena.refs), np.bool_)
        marked[self.arena.cell_of(held)] = True
        for digest in list(self._entries) if digests is None else digests:
            if digest not in self._entries:
                continue
            blocks = self._entries[digest].blocks
            for group, own in enumerate(blocks):
                if own is not None and marked[self.arena.cell_of(own)].any():
                    blocks[group] = None
                    self.arena.release(own)
            if all(own is None for own in blocks):
                del self._entries[digest]

    def leave(self, chain: PrefixChain, block: int, blocks: Sequence[Addresses | None]) -> None:
        """Let go of those groups of an entry, if there is one, that list exactly `blocks`: another entry has them."""
        entry = self._entries.get(chain.digests[block]) if block < len(chain.digests) else None
        if entry is None:
            return
        for group, addresses in enumerate(blocks):
            own = entry.blocks[group]
            if own is not None and addresses is not None and np.array_equal(own, addresses):
                entry.blocks[group] = None
                self.arena.release(own)
        if all(own is None for own in entry.blocks):
            del self._entries[chain.digests[block]]

    def clear(self) -> None:
        """Remove every entry and release its blocks."""
        self.drop(list(self._entries))

    def held_blocks(self) -> Iterator[Addresses]:
        """Yield every array of addresses that the index holds a reference on."""
        for entry in self._entries.values():
            for addresses in entry.blocks:
                if addresses is not None:
                    yield addresses

    def idle_blocks(self) -> dict[int, int]:
        """Return the blocks (block bytes -> number) that `reclaim` could free now."""
        held = list(self.held_blocks())
        if not held:
            return {}
        every = np.concatenate(held)
        idle = every[self.arena.references(every) == 1]
        sizes, counts = np.unique(self.arena.block_bytes_at(idle), return_counts=True)
        return dict(zip(sizes.tolist(), counts.tolist(), strict=True))

    @property
    def idle_bytes(self) -> int:
        """Bytes that `reclaim` could free now."""
        return sum(size * count for size, count in self.idle_blocks().items())
