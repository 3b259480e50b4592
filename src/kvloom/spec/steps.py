"""Bytes of one request in a step, from the tokens that the step takes."""

from kvloom.spec.kv import KVSpec


def step_blocks(kv: KVSpec, start: int, end: int, window: int | None) -> int:
    """Return the blocks of one lane in a step that takes tokens `start .. end - 1`, old ones having been freed.

    A step that needs no block frees none either: it holds what the step before did, which was no less than this.
    """
    behind = 0 if window is None else max(0, start - (window - 1)) // kv.block_size
    return -(-end // kv.block_size) - behind


def step_bytes(kv: KVSpec, start: int, end: int) -> int:
    """Return the arena bytes of one request in a step that takes its tokens `start .. end - 1`."""
    return sum(
        len(group.lanes) * group.block_bytes * step_blocks(kv, start, end, group.window) for group in kv.groups
    )
