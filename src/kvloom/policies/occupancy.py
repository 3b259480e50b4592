"""Occupancy: the most bytes that a sequence under a policy can come to hold. Admission reserves by it. Torch-free."""

from collections.abc import Sequence

from kvloom.policies.policy import Policy
from kvloom.policies.scorer import Selector
from kvloom.spec.kv import KVSpec


class Occupancy:
    """Upper bounds for one request under `policy`; `layers` are those on which it acts."""

    def __init__(
        self, policy: Policy, spec: KVSpec, prompt_tokens: int, layers: Sequence[int], replay_tokens: int = 0
    ) -> None:
        """Plan for a prompt after which up to `replay_tokens` more are held for the time of a replay."""
        self.policy = policy
        self.spec = spec
        self.prompt_tokens = prompt_tokens
        self.budget = policy.tokens(prompt_tokens)
        self.layers = frozenset(layers)
        self.replay_tokens = replay_tokens

    def may_drop(self, num_tokens: int) -> bool:
        """Return whether a sequence that grows to `num_tokens` can lose any token at all."""
        if isinstance(self.policy.rule, Selector) or self.policy.budget.acts_always:
            return True
        longest = num_tokens if self.policy.triggers.while_decoding else self.prompt_tokens
        return self.budget < longest

    def peak_bytes(self, num_tokens: int, chunk: int, sequences: int = 1) -> int:
        """Return the most arena bytes of a request on its way to `num_tokens`, in chunks of at most `chunk` tokens.

        Of several `sequences` each may come to need its own copy of everything when they go on from the prompt.
        """
        triggers = self.policy.triggers
        before = min(num_tokens, self.prompt_tokens)
        prefill, piece = before, chunk
        if triggers.chunk is not None:
            piece = min(chunk, triggers.chunk)
            if not isinstance(self.policy.rule, Selector):
                prefill = min(before, self.budget + triggers.chunk)
        during = self._bytes(prefill + self.replay_tokens, before + self.replay_tokens, piece)
        return max(during, sequences * self.decode_bytes(num_tokens))

    def decode_bytes(self, num_tokens: int) -> int:
        """Return the most bytes of one sequence after its prompt, on its way to `num_tokens`."""
        return self._bytes(self.bound(num_tokens), num_tokens, 1)

    def bound(self, num_tokens: int) -> int:
        """Return the most tokens that a lane holds after the prompt, on average over lanes."""
        generated = max(0, num_tokens - self.prompt_tokens)
        triggers = self.policy.triggers
        start = self.prompt_tokens
        if triggers.prefill or triggers.chunk is not None:
            start = min(start, self.budget)
        elif triggers.slack is not None:
            start = min(start, self.budget + triggers.slack)
        if triggers.while_decoding:
            return min(start + generated, max(start, self.budget) + triggers.excess())
        return start + generated

    def _bytes(self, tokens: int, num_tokens: int, chunk: int) -> int:
        """Return the bytes of `tokens` in the lanes that the policy acts on, on average, and all of the others."""
        size, rule = self.spec.block_size, self.policy.rule
        total = 0
        for layer, kv in enumerate(self.spec.layers):
            if kv.source is not None:
                continue
            cost = self.spec.layer_block_bytes(layer)
            if layer not in self.layers:
                total += kv.num_lanes * self.spec.lane_blocks(num_tokens, kv.window, chunk) * cost
            elif isinstance(rule, Selector):
                for head in range(kv.num_lanes):
                    total += self._selected_blocks(rule.bound(layer, head), num_tokens) * cost
            elif self.policy.budget.uneven:
                # n lanes with n * tokens between them fill at most this many blocks, each lane's last one partly
                total += kv.num_lanes * (tokens + size - 1) * cost // size
            else:
                total += kv.num_lanes * -(-tokens // size) * cost
        return total

    def _selected_blocks(self, bound: int | None, num_tokens: int) -> int:
        """Return the most blocks of a lane to which a selector leaves `bound` tokens."""
        triggers, size = self.policy.triggers, self.spec.block_size
        if bound is None:
            return -(-num_tokens // size)
        held = num_tokens
        if num_tokens <= self.prompt_tokens:
            held = self.prompt_tokens if triggers.chunk is None else bound + triggers.chunk
        elif triggers.while_decoding:
            held = bound + triggers.excess()
        return -(-min(held, num_tokens) // size)
