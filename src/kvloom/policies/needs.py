"""Needs: what a scorer must be shown besides keys, values and positions. Torch-free."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Needs:
    """Everything that has to be gathered for a scorer while the model runs; the default is nothing.

    queries         the newest so many queries of each layer (rotated), 0 for none
    key_mass        for each key, the attention weight summed over every query so far
    query_moments   mean and covariance of the unrotated queries of the prompt
    replay          a second pass over the context (KVzip)
    output_weights  the output projection W_O of each layer
    token_ids       the tokens themselves
    """

    queries: int = 0
    key_mass: bool = False
    query_moments: bool = False
    replay: bool = False
    output_weights: bool = False
    token_ids: bool = False

    def union(self, other: "Needs") -> "Needs":
        """Return what satisfies both."""
        return Needs(
            queries=max(self.queries, other.queries),
            key_mass=self.key_mass or other.key_mass,
            query_moments=self.query_moments or other.query_moments,
            replay=self.replay or other.replay,
            output_weights=self.output_weights or other.output_weights,
            token_ids=self.token_ids or other.token_ids,
        )

    @property
    def watches_queries(self) -> bool:
        """True when queries must be shown while they are computed."""
        return bool(self.queries or self.key_mass or self.query_moments)

    def usable_prefix(self, prompt_tokens: int) -> int:
        """Return how many tokens of a prompt may come from the prefix cache without changing what is kept.

        A cached prefix has keys and values but no queries: a window of queries must lie in the computed rest, and
        statistics over all queries allow no cached token at all.
        """
        if self.key_mass or self.query_moments:
            return 0
        return max(0, prompt_tokens - self.queries)
