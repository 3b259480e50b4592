"""Distribution: the tokens left by temperature, top-k, top-p and min-p, with their probabilities."""

import numpy as np
from numpy.typing import NDArray

from kvloom.engine.params import SamplingParams
from kvloom.engine.race import race

SORTED = 2048
"""Tokens up to which sorting costs less than dividing them by likelihood."""

DIVISIONS = 1024
"""Number of parts, of equal width in the logit, into which more tokens than that are divided."""

REACH = 40.0
"""Width of all but the last of them, in logits at temperature 1: what is further down has no more than e^-40 each."""

LEAST_WIDTH = 1e-30
"""Logits closer together than this are sorted, however many: their parts would not be told apart in float32."""


def best(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Return the `count` most likely tokens of logits [V], best first, of equal ones the lower id first.

    Linear in V: what is not below the last of them is selected, and only that is sorted. Logits are not NaN.
    """
    size = len(logits)
    if count <= 0:
        return np.zeros(0, np.int64)
    if count >= size:
        return descending(logits)
    last = np.partition(logits, size - count)[size - count]
    tokens = np.flatnonzero(logits >= last)
    return tokens[descending(logits[tokens])[:count]]


def descending(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the places of values [n], the largest first, of equal ones the earlier first.

    Sorts integers that hold the value in their upper and the place in their lower half, none of which are equal: that
    needs no stable sort, which takes ten times as long.
    """
    bits = (values + np.float32(0)).view(np.int32)  # the sum turns -0.0, whose bits differ, into 0.0
    ascending = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))  # floats of either sign in the order of integers
    keys = (~ascending).astype(np.int64)
    keys <<= 32
    keys |= np.arange(len(values))
    keys.sort()
    keys &= 0xFFFFFFFF
    return keys


class Distribution:
    """Tokens [n] with their logits float32 and weights float64, which are in proportion to their probabilities.

    Every row is a matter of one thread and of itself alone, so neither the batch nor the number of threads changes a
    result, and its weights stay in a core's cache.
    """

    def __init__(
        self,
        tokens: NDArray[np.int64] | None,
        logits: NDArray[np.float32],
        weights: NDArray[np.float64],
        temperature: float,
    ) -> None:
        """Take tokens [n], of which equally likely ones are in order of id; None is all, where no filter applies."""
        self.tokens = tokens
        self.logits = logits
        self.weights = weights
        self.temperature = temperature

    @classmethod
    def of(cls, logits: NDArray[np.float32], params: SamplingParams) -> "Distribution":
        """Return what the parameters, whose temperature is not 0, leave of logits [V].

        The filters, each on what the one before it left: temperature, min-p, top-k, top-p. Logits of minus infinity may
        be left, without weight. Where the best logit is not finite, it is the only one left.
        """
        top = logits.max()
        if not np.isfinite(top):
            return cls(np.array([logits.argmax()]), np.zeros(1, np.float32), np.ones(1), params.temperature)
        tokens: NDArray[np.int64] | None = None
        if 0 < params.top_k < len(logits):
            tokens = best(logits, params.top_k)
            logits = logits[tokens]
        left = cls(tokens, logits, _weights(logits, float(top), params.temperature), params.temperature)
        if params.min_p > 0:
            left = left._only(left.weights >= params.min_p)
        return left._nucleus(params.top_p) if params.top_p < 1 else left

    def _only(self, kept: NDArray[np.bool_]) -> "Distribution":
        """Return what is left of the tokens by a mask [n]."""
        places = np.flatnonzero(kept)
        tokens = places if self.tokens is None else self.tokens[places]
        return Distribution(tokens, self.logits[places], self.weights[places], self.temperature)

    def _nucleus(self, top_p: float) -> "Distribution":
        """Return the smallest set of the likeliest tokens whose share of the weights reaches `top_p`."""
        last = self._place(top_p * float(self.weights.sum()))
        kept = self.logits > self.logits[last]
        kept[: last + 1] |= self.logits[: last + 1] == self.logits[last]
        return self._only(kept)

    def draw(self, seed: int) -> int:
        """Return the token that wins the race of `seed`; never one without weight."""
        place = race(self.weights, seed, self.tokens)
        return place if self.tokens is None else int(self.tokens[place])

    def _place(self, target: float) -> int:
        """Return the place of the token with which the weights, likeliest first, come to `target`.

        Only the relevant tokens are sorted: tokens are divided by likelihood, the weights of each part are summed, and
        the part with the target is divided again, until it is small or all its tokens are equally likely.
        """
        places: NDArray[np.int64] | None = None
        logits, weights = self.logits, self.weights
        while len(logits) > SORTED:
            top = logits.max()
            width = min(float(top) - float(logits.min()), REACH * self.temperature)
            if width < LEAST_WIDTH:
                break
            with np.errstate(over="ignore"):  # of logits that stand for minus infinity
                depths = (top - logits) * np.float32(DIVISIONS / width)
            parts = np.minimum(depths, np.float32(DIVISIONS - 1), out=depths).astype(np.intp)
            part, target = _step(np.cumsum(np.bincount(parts, weights, DIVISIONS)), target)
            inside = np.flatnonzero(parts == part)
            places = inside if places is None else places[inside]
            logits, weights = logits[inside], weights[inside]
        order = descending(logits)
        place = order[_step(np.cumsum(weights[order]), target)[0]]
        return int(place if places is None else places[place])


def _weights(logits: NDArray[np.float32], top: float, temperature: float) -> NDArray[np.float64]:
    """Return exp((logits - top) / temperature)."""
    weights = logits.astype(np.float64)
    weights -= top
    if temperature != 1:
        with np.errstate(over="ignore"):  # at next to no temperature what is below the top has no weight
            weights /= temperature
    np.exp(weights, out=weights)
    return weights


def _step(ends: NDArray[np.float64], target: float) -> tuple[int, float]:
    """Return the first of n places where cumulative weights come to a target, and what that place adds to reach it.

    Where rounding left none, it is the last place with weight.
    """
    place = int(np.searchsorted(ends, target))
    if place == len(ends):
        place = int(np.searchsorted(ends, ends[-1]))
    return place, target - float(ends[place - 1]) if place else target
