"""Usage: the tokens of a body's requests, and the truth about their KV cache."""

from dataclasses import dataclass, field
from typing import Any

from kvloom.engine.output import KVUsage
from kvloom.server.answer import Update


@dataclass
class Usage:
    """Counts over all requests of one body; `bits_per_token` is what a token costs in the native store."""

    prompt_tokens: int
    native_bits: float
    bits_per_token: float
    completion_tokens: int = 0
    kv: dict[int, KVUsage] = field(default_factory=dict)

    def count(self, update: Update) -> None:
        """Add what `update` brings; mutates self."""
        self.completion_tokens += sum(len(delta.token_ids) for delta in update.deltas.values())
        if update.kv is not None:
            self.kv[update.place] = update.kv

    def body(self) -> dict[str, Any]:
        """Return the `usage` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(kv.cached_tokens for kv in self.kv.values())},
            "kv": self._kv(),
        }

    def _kv(self) -> dict[str, Any] | None:
        parts = list(self.kv.values())
        if not parts:
            return None
        bits = sum(kv.bits_per_element for kv in parts) / len(parts)
        return {
            "method": parts[0].method,
            "bytes_now": sum(kv.bytes_now for kv in parts),
            "bytes_peak": sum(kv.bytes_peak for kv in parts),
            "evicted_tokens": sum(kv.evicted_tokens for kv in parts),
            "bits_per_token": self.bits_per_token * bits / self.native_bits,
            "bits_per_element": bits,
            "shortest_lane": min(kv.shortest_lane for kv in parts),
            "longest_lane": max(kv.longest_lane for kv in parts),
            "preemptions": sum(kv.preemptions for kv in parts),
            "notes": sorted({kv.note for kv in parts if kv.note is not None}),
        }
