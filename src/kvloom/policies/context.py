"""ScoreContext: the inputs of a scorer for one layer of one sequence."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from kvloom.errors import MethodError
from kvloom.kernels import reference
from kvloom.policies.declared import Declared, undeclared
from kvloom.spec.needs import NOTHING, Needs


@dataclass(frozen=True)
class QueryMoments:
    """Mean [H, D] and covariance [H, D, D] of a layer's unrotated queries, float64, over `count` prompt tokens."""

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int


@dataclass(frozen=True)
class Gathered:
    """Inputs of a layer that methods declare in their `Needs`; undeclared ones are None (see there)."""

    queries: torch.Tensor | None = None
    query_positions: torch.Tensor | None = None
    key_mass: torch.Tensor | None = None
    near_mass: torch.Tensor | None = None
    query_moments: QueryMoments | None = None
    output_weight: torch.Tensor | None = None
    replay: torch.Tensor | None = None
    special: torch.Tensor | None = None
    punctuation: torch.Tensor | None = None


@dataclass(frozen=True)
class ScoreContext:
    """The tokens in the G lanes of one layer, in S slots; shorter lanes are padded in front (`valid` False).

    Rules that declare `stacks` get several layers of equal shape at once: then every [G, S] is an [L, G, S], other
    inputs of one layer are None, and `layer` is the first of them.

    keys       [G, S, D]  as cached (after rope), float32       values  [G, S, Dv]  float32; gathered by `read` on
                          first access
    positions  [G, S]     int64, ascending where valid          valid   [G, S]      bool
    log_count  [G, S]     term added to the scores of merged tokens; None where nothing was merged
    inverse_frequencies   theta [D / 2] of the layer's rope, None without rope
    state                 state of the method for this layer of this sequence, kept between decisions; a method may put
                          tensors in, and replaces them instead of changing them

    The following raise `MethodError` for a method that did not declare them in its `needs`:

    queries    [w, H, D]  newest queries, float32, with query_positions [w]
    key_mass   [G, S]     attention summed over the queries so far, mean over the query group
    near_mass  [G, S]     the part of it that came from prompt queries close by
    query_moments         mean and covariance of the prompt's queries; None when all of them were left out
    replay     [G, S]     most attention that any query of a replay paid
    special, punctuation  [G, S] bool
    output_weight         W_O [hidden, H * Dv], float32
    """

    layer: int
    num_layers: int
    num_query_heads: int
    scale: float
    read: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    positions: torch.Tensor
    valid: torch.Tensor
    seen: int
    prompt_tokens: int
    budget: int
    request_seed: int = 0
    method: str = "a method"
    needs: Needs = NOTHING
    gathered: Gathered = field(default_factory=Gathered)
    inverse_frequencies: torch.Tensor | None = None
    log_count: torch.Tensor | None = None
    weigh: Callable[[int], torch.Tensor | None] = lambda window: None  # `window_mass` by the kernels, if they can
    state: dict[str, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def _content(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.read()
        return keys.float(), values.float()

    @property
    def keys(self) -> torch.Tensor:
        """K [G, S, D], float32."""
        return self._content[0]

    @property
    def values(self) -> torch.Tensor:
        """V [G, S, Dv], float32."""
        return self._content[1]

    queries = Declared[torch.Tensor]("Needs(queries=...)")
    query_positions = Declared[torch.Tensor]("Needs(queries=...)")
    key_mass = Declared[torch.Tensor]("Needs(key_mass=True)")
    near_mass = Declared[torch.Tensor]("Needs(near=...)")
    replay = Declared[torch.Tensor]("Needs(replay=...)")
    special = Declared[torch.Tensor]("Needs(token_kinds=True)")
    punctuation = Declared[torch.Tensor]("Needs(token_kinds=True)")
    output_weight = Declared[torch.Tensor]("Needs(output_weights=True)")

    @property
    def query_moments(self) -> QueryMoments | None:
        """Moments of the prompt's queries; None when all of them were left out."""
        if not self.needs.query_moments:
            raise undeclared(self.method, "query_moments", "Needs(query_moments=True)")
        return self.gathered.query_moments

    @property
    def num_lanes(self) -> int:
        """G."""
        return self.valid.shape[-2]

    @property
    def group_size(self) -> int:
        """Query heads per lane, r = H / G."""
        return self.num_query_heads // self.num_lanes

    def by_lane(self, per_head: torch.Tensor) -> torch.Tensor:
        """Reshape [H, ...] to [G, r, ...]: query head h reads lane h // r."""
        return per_head.reshape(self.num_lanes, self.group_size, *per_head.shape[1:])

    def window_attention(self, window: int) -> torch.Tensor:
        """Return the weights [H, w, S] of the newest `window` queries (fewer if there are fewer) over all held keys.

        Causal by position, softmax over everything held; never larger than the window of rows.
        """
        if window > self.needs.queries:
            raise MethodError(
                f"{self.method} weighs by the newest {window} queries and declared {self.needs.queries}; "
                f"add Needs(queries={window}) to its needs"
            )
        queries, places = self.queries[-window:], self.query_positions[-window:]
        seen = self.valid[:, None, :] & (self.positions[:, None, :] <= places[None, :, None])
        return reference.attention_weights(queries, self.keys, seen, self.scale, self.log_count)

    def window_mass(self, window: int) -> torch.Tensor:
        """Return the weights of `window_attention` summed over the queries, mean over the query group: [G, S]."""
        mass = self.weigh(window) if window <= self.needs.queries else None
        return self.by_lane(self.window_attention(window).sum(1)).mean(1) if mass is None else mass

    def newest(self, count: int) -> torch.Tensor:
        """Return [G, S] bool: the tokens among the newest `count` seen, by position."""
        return self.valid & (self.positions >= self.seen - count)

    def first(self, count: int) -> torch.Tensor:
        """Return [G, S] bool: the tokens at positions below `count`."""
        return self.valid & (self.positions < count)

    def output_norms(self, order: int) -> torch.Tensor:
        """Return ||W_O v|| [H, S] of every query head's share of the output projection, in the 1- or 2-norm."""
        return output_norms(self.output_weight, self.values, self.num_query_heads, order)


def output_norms(weight: torch.Tensor, values: torch.Tensor, num_query_heads: int, order: int) -> torch.Tensor:
    """Return ||W_O v|| [H, S] for weight W_O [hidden, H * Dv] and values [G, S, Dv]; query head h reads lane h // r."""
    width, group = values.shape[2], num_query_heads // values.shape[0]
    norms = []
    for head in range(num_query_heads):
        brought = values[head // group] @ weight[:, head * width : (head + 1) * width].T  # [S, hidden]
        norms.append(torch.linalg.vector_norm(brought, ord=order, dim=-1))
    return torch.stack(norms)
