"""The race that draws a token: each token has a clock of its own, and the first to ring, by its weight, is drawn.

An exponential variable divided by a weight is exponential with that rate, and the least of several falls on each with
its share of the weights (the Gumbel-max trick in other words). A change of the logits by a rounding moves only what
was nearly a tie, whereas a place in cumulative weights moves with the roundings of all tokens before it.
"""

import numpy as np
from numpy.random import Philox
from numpy.typing import NDArray

STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Constants of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")."""

GROUP = 256
"""Tokens that race together first where all ids race."""

SLACK = 1 - 2.0**-40
"""Keeps roundings of a logarithm from excluding the winner."""


def race_seed(seed: int, index: int, place: int) -> int:
    """Return the 64 bits that belong to output token `place` of sequence `index` of a request with `seed`."""
    key = np.array([seed % 2**64, index], np.uint64)  # a list would go through float64 where a seed exceeds int64
    return int(Philox(key=key, counter=[place, 0, 0, 0]).random_raw())


def race(weights: NDArray[np.float64], seed: int, tokens: NDArray[np.int64] | None = None) -> int:
    """Return the place of the winner among weights [n], some of which are above 0; never one without weight.

    `tokens` [n] are the ids that the clocks belong to. None is all ids below n: then groups of `GROUP` tokens race
    first, each with the sum of its weights, and the tokens of the winner after them, which saves most clocks and draws
    with the same probabilities.
    """
    if tokens is not None:
        return winner(weights, uniforms(seed, tokens))
    starts = np.arange(0, len(weights), GROUP)
    group = winner(np.add.reduceat(weights, starts), uniforms(~seed, np.arange(len(starts))))
    inside = weights[group * GROUP : (group + 1) * GROUP]
    return group * GROUP + winner(inside, uniforms(seed, np.arange(len(inside)) + group * GROUP))


def uniforms(seed: int, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return numbers [n], strictly between 0 and 1, that belong to `seed` and to each of the token ids [n] alone.

    That of token t is output t of SplitMix64, of which every output can be computed without the others.
    """
    state = tokens.astype(np.uint64)
    state *= np.uint64(STEP)
    state += np.uint64((seed + STEP) % 2**64)
    state ^= state >> np.uint64(30)
    state *= np.uint64(FIRST)
    state ^= state >> np.uint64(27)
    state *= np.uint64(SECOND)
    state ^= state >> np.uint64(31)
    state >>= np.uint64(12)
    found: NDArray[np.float64] = state.astype(np.float64)
    found += 0.5
    found *= 2.0**-52
    return found


def winner(weights: NDArray[np.float64], numbers: NDArray[np.float64]) -> int:
    """Return the place of the largest weight / -log(number), both [n], of equal ones the first.

    A logarithm is taken of those only that can still win: -log(u) >= 1 - u.
    """
    likely = int(weights.argmax())
    bound = weights[likely] / -np.log(numbers[likely]) * SLACK
    able = np.flatnonzero(weights >= bound * (1 - numbers))
    return int(able[(weights[able] / -np.log(numbers[able])).argmax()])
