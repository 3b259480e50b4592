"""Needs: what a method must be shown besides keys, values and positions. Torch-free."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Needs:
    """Everything that has to be gathered for a method while the model runs; the default is nothing.

    queries         the newest so many queries of each layer (rotated), 0 for none
    key_mass        for each key, the attention weight summed over the queries so far
    mass_window     of the prompt, only this many last queries count for `key_mass`; None: all
    near            also the part of `key_mass` that comes from queries closer than this fraction of the prompt
    query_moments   mean and covariance of the unrotated queries of the prompt
    moment_skip     first positions that query moments leave out
    replay          a second pass over the context, in parts of this many tokens (KVzip); 0 for none
    replay_sinks    first positions that the queries of every such part see
    layer_inputs    norms of each layer's input, during a replay
    output_weights  the output projection W_O of each layer
    token_ids       the tokens themselves
    token_kinds     which tokens are special or punctuation

    A learned scorer that reads hidden states (KVzap, DMS) will ask for them here, beside `layer_inputs`.
    """

    queries: int = 0
    key_mass: bool = False
    mass_window: int | None = None
    near: float | None = None
    query_moments: bool = False
    moment_skip: int = 0
    replay: int = 0
    replay_sinks: int = 0
    layer_inputs: bool = False
    output_weights: bool = False
    token_ids: bool = False
    token_kinds: bool = False

    def union(self, other: "Needs") -> "Needs":
        """Return what satisfies both; which queries count for the mass is decided by the first that needs it."""
        return Needs(
            queries=max(self.queries, other.queries),
            key_mass=self.key_mass or other.key_mass,
            mass_window=self.mass_window if self.key_mass else other.mass_window,
            near=self.near if self.near is not None else other.near,
            query_moments=self.query_moments or other.query_moments,
            moment_skip=max(self.moment_skip, other.moment_skip),
            replay=max(self.replay, other.replay),
            replay_sinks=max(self.replay_sinks, other.replay_sinks),
            layer_inputs=self.layer_inputs or other.layer_inputs,
            output_weights=self.output_weights or other.output_weights,
            token_ids=self.token_ids or other.token_ids,
            token_kinds=self.token_kinds or other.token_kinds,
        )

    @property
    def gathered(self) -> list[str]:
        """What has to be gathered, by name."""
        what = ("queries", "key_mass", "query_moments", "replay", "layer_inputs", "output_weights", "token_ids",
                "token_kinds")  # fmt: skip
        return [name for name in what if getattr(self, name)] + ["near"] * (self.near is not None)

    @property
    def watches_queries(self) -> bool:
        """True when queries must be shown while they are computed."""
        return bool(self.queries or self.key_mass or self.query_moments)

    @property
    def weighs(self) -> bool:
        """True when attention weights are computed from queries and keys."""
        return bool(self.watches_queries or self.replay)

    def usable_prefix(self, prompt_tokens: int) -> int:
        """Return how many tokens of a prompt may come from the prefix cache without changing what is kept.

        A cached prefix has keys and values but no queries: a window of queries must lie in the computed rest, and
        statistics over all queries allow no cached token at all.
        """
        if self.query_moments or (self.key_mass and self.mass_window is None) or self.near is not None:
            return 0
        window = (self.mass_window or 0) if self.key_mass else 0
        return max(0, prompt_tokens - max(self.queries, window))


NOTHING = Needs()
