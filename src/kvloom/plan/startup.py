"""Figures of an engine at its start: the plan's, with the actual bytes of weights and arena."""

from dataclasses import replace
from typing import Any

from kvloom.plan.memory import Memory, footprint_of
from kvloom.plan.process import Process
from kvloom.plan.question import Question
from kvloom.spec.policy import FULL
from kvloom.spec.search import largest
from kvloom.spec.slabs import longest_request, sure_bytes
from kvloom.spec.store import SLAB_BYTES

ASSUMED = ("activation_bytes", "tokenizer_bytes", "runtime_bytes", "loading_bytes", "total_bytes")
"""Fields that depend on assumptions; the others follow by arithmetic."""


def start_figures(asked: Question, arena_bytes: int) -> dict[str, Any]:
    """Return the memory of a process that serves `asked.model` from an arena of `arena_bytes`, and what fits in it.

    `asked.users` is the most that run at once, and `asked.context` the longest request. `requests_that_fit` says by
    their tokens (an eighth of them output) how many requests fit in the arena together, each at its peak.
    """
    process, kv = Process(asked), asked.whole_kv
    assert kv is not None, "a model that runs has keys and values"
    stores = [] if asked.policy.store is None else [asked.policy.store.name]
    room = sure_bytes(kv, arena_bytes, stores)
    parts = {
        "weight_bytes": process.weights, "activation_bytes": process.activations, "tokenizer_bytes": process.tokenizer,
        "runtime_bytes": process.runtime, "loading_bytes": process.loading,
    }  # fmt: skip
    facts = {name: int(figure.value or 0) for name, figure in parts.items()}
    running = facts["activation_bytes"] + arena_bytes
    idle = facts["weight_bytes"] + facts["tokenizer_bytes"] + facts["runtime_bytes"]
    sizes = sorted({group.block_bytes for group in kv.groups})
    lengths = sorted({max(2, asked.context >> shift) for shift in (0, 2, 4)}, reverse=True)
    return {
        **facts,
        "kv_cache_bytes": arena_bytes,
        "total_bytes": idle + max(running, facts["loading_bytes"]),
        "kv_bytes_per_token": kv.bytes_per_token,
        "kv_blocks": {str(size): arena_bytes // SLAB_BYTES * (SLAB_BYTES // size) for size in sizes},
        "longest_request": _longest(asked, arena_bytes, room),
        "requests_that_fit": {str(length): _requests(asked.with_context(length), room) for length in lengths},
        "assumed": list(ASSUMED),
    }


def _longest(asked: Question, arena_bytes: int, room: int) -> int:
    """Return the tokens of the longest request that fits alone and that the model was made for."""
    kv, most = asked.whole_kv, asked.model.max_position or 1 << 30
    assert kv is not None
    if asked.policy == FULL:
        return min(most, longest_request(kv, arena_bytes, asked.chunk))
    return largest(lambda tokens: footprint_of(_split(asked, tokens)).peak.high <= room, 1, most) or 0


def _split(asked: Question, tokens: int) -> Question:
    """Return `asked` for one request of `tokens`, an eighth of them output."""
    output = tokens // 8
    return replace(asked, users=1, prompt=tokens - output, output=output)


def _requests(asked: Question, room: int) -> int:
    """Return how many such requests fit into `room` bytes."""
    one = _split(asked, asked.context)
    memory = Memory(one)
    return largest(lambda users: memory.kv_bytes(replace(one, users=users)) <= room, 1, room) or 0
