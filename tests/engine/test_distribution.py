"""The distribution that is drawn from is that of the obvious way, which sorts the whole vocabulary."""

import math

import numpy as np
import pytest
import torch

from harness.threads import threads
from kvloom.engine import distribution
from kvloom.engine.distribution import Distribution, best
from kvloom.engine.occurrences import Occurrences
from kvloom.engine.params import SamplingParams
from kvloom.engine.race import race_seed
from kvloom.engine.request import Request, Sequence
from kvloom.engine.sampler import Sampler, penalise

VOCABULARY = 20_011
FILTERS: dict[str, dict[str, float]] = {
    "none": {},
    "hot": {"temperature": 1.7},
    "top_p": {"top_p": 0.9},
    "high top_p": {"top_p": 0.9999, "temperature": 1.3},
    "low top_p": {"top_p": 1e-6},
    "cold top_p": {"top_p": 0.95, "temperature": 0.2},
    "top_k": {"top_k": 50},
    "wide top_k": {"top_k": 9000},
    "top_k and top_p": {"top_k": 300, "top_p": 0.8},
    "wide top_k and top_p": {"top_k": 9000, "top_p": 0.97, "temperature": 2.0},
    "min_p": {"min_p": 0.02},
    "low min_p": {"min_p": 1e-7, "temperature": 1.2},
    "all": {"min_p": 1e-5, "top_k": 5000, "top_p": 0.93, "temperature": 0.8},
    "min_p and top_p": {"min_p": 1e-5, "top_p": 0.9},
}
KINDS = ["peaked", "flat", "coarse", "masked", "equal"]


def params(**options: object) -> SamplingParams:
    return SamplingParams(**options)  # type: ignore[arg-type]


def row(kind: str, size: int = VOCABULARY, seed: int = 0) -> np.ndarray:
    """Logits [size] float32: few likely tokens; all alike; many equal; most forbidden; all equal."""
    rng = np.random.default_rng(seed)
    if kind == "peaked":
        logits = 2.2 * rng.standard_normal(size)
        logits[rng.integers(0, size, 40)] += 14 * rng.random(40)
    elif kind == "flat":
        logits = 0.3 * rng.standard_normal(size)
    elif kind == "coarse":
        logits = np.round(rng.standard_normal(size) * 4) / 4
    elif kind == "masked":
        logits = np.where(rng.random(size) < 0.3, 2 * rng.standard_normal(size), -np.inf)
    else:
        logits = np.full(size, -3.25)
    return logits.astype(np.float32)


def obvious(logits: np.ndarray, options: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and weights, all of them sorted where a filter applies."""
    scaled = torch.from_numpy(logits).double() / options.temperature
    order = torch.arange(len(scaled))
    if 0 < options.top_k < len(scaled) or options.top_p < 1 or options.min_p > 0:
        scaled, order = torch.sort(scaled, descending=True, stable=True)
    if 0 < options.top_k < len(scaled):
        scaled, order = scaled[: options.top_k], order[: options.top_k]
    weights = torch.exp(scaled - scaled.max())
    if options.min_p > 0:
        weights = torch.where(weights >= options.min_p, weights, 0.0)
    if options.top_p < 1:
        cumulative = torch.cumsum(weights, dim=0)
        weights = torch.where(cumulative - weights < options.top_p * cumulative[-1], weights, 0.0)
    return order, weights


def first_to_ring(weights: dict[int, float], seed: int) -> int:
    """Return the number whose exponential clock, run at the rate of its weight, rings first.

    The clocks are those of SplitMix64 in integers of Python, output by output.
    """
    rung = {}
    for number, weight in weights.items():
        if weight > 0:
            state = (seed + 0x9E3779B97F4A7C15 * (number + 1)) % 2**64
            state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
            rung[number] = -math.log(((state ^ state >> 31) // 2**12 + 0.5) / 2**52) / weight
    return min(rung, key=lambda number: (rung[number], number))


def obvious_draw(order: torch.Tensor, weights: torch.Tensor, seed: int, filtered: bool) -> int:
    """Return the token that wins; without a filter its group of 256 wins first, under the complement of the seed."""
    found = dict(zip(order.tolist(), weights.tolist(), strict=True))
    if not filtered:
        sums = {group: sum(w for t, w in found.items() if t // 256 == group) for group in {t // 256 for t in found}}
        group = first_to_ring(sums, ~seed)
        found = {token: weight for token, weight in found.items() if token // 256 == group}
    return first_to_ring(found, seed)


def probabilities(logits: np.ndarray, options: SamplingParams) -> np.ndarray:
    """Probabilities [V] of what is left."""
    left = Distribution.of(logits, options)
    found = np.zeros(len(logits))
    found[slice(None) if left.tokens is None else left.tokens] = left.weights / left.weights.sum()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILTERS)
def test_the_tokens_that_are_left_and_their_probabilities_are_those_of_sorting_everything(kind: str, name: str) -> None:
    options = params(**FILTERS[name])
    logits = row(kind)
    order, weights = obvious(logits, options)
    expected = np.zeros(VOCABULARY)
    expected[order.numpy()] = (weights / weights.sum()).numpy()
    found = probabilities(logits, options)
    assert ((found > 0) == (expected > 0)).all()
    np.testing.assert_allclose(found, expected, rtol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["none", "hot", "top_p", "top_k", "min_p", "all"])
def test_a_seed_draws_the_token_that_wins_among_everything_sorted(kind: str, name: str) -> None:
    options = params(**FILTERS[name])
    logits = row(kind, size=3001, seed=1)
    left, (order, weights) = Distribution.of(logits, options), obvious(logits, options)
    for place in range(6):
        seed = race_seed(5, 0, place)
        assert left.draw(seed) == obvious_draw(order, weights, seed, name not in ("none", "hot"))


@pytest.mark.parametrize("name", ["none", "hot", "top_p"])
def test_roundings_of_the_logits_change_a_draw_only_where_two_tokens_were_nearly_tied(name: str) -> None:
    """A draw differs with a probability of the order of the relative change, 1e-4, whatever stands before the token.

    A place in cumulative weights of 20,011 tokens that are all alike would move in half of the draws.
    """
    options, logits = params(**FILTERS[name]), row("flat")
    moved = logits + (1e-4 * np.random.default_rng(1).standard_normal(VOCABULARY)).astype(np.float32)
    one, other = Distribution.of(logits, options), Distribution.of(moved, options)
    seeds = [race_seed(3, 0, place) for place in range(1000)]
    assert sum(one.draw(seed) != other.draw(seed) for seed in seeds) <= 2


@pytest.mark.parametrize("divisions", [2, 3, 7])
def test_parts_may_be_divided_again_until_one_token_is_left(monkeypatch: pytest.MonkeyPatch, divisions: int) -> None:
    monkeypatch.setattr(distribution, "SORTED", 1)
    monkeypatch.setattr(distribution, "DIVISIONS", divisions)
    for seed, kind in enumerate(KINDS * 3):
        logits = row(kind, size=400, seed=seed)
        for options in (params(top_p=0.9), params(min_p=1e-3, top_p=0.99, temperature=0.7), params(top_k=300)):
            left, (order, weights) = Distribution.of(logits, options), obvious(logits, options)
            assert left.tokens is not None
            assert set(left.tokens[left.weights > 0].tolist()) == set(order[weights > 0].tolist())


@pytest.mark.parametrize("name", ["none", "top_p", "top_k and top_p", "min_p", "all"])
def test_draws_have_the_frequencies_of_the_distribution(name: str) -> None:
    """Chi-square over 24 classes of about equal probability: 23 degrees of freedom, beyond 58.6 6 times in 100,000."""
    options = params(**FILTERS[name])
    logits = row("peaked", size=3001, seed=4)
    left, expected = Distribution.of(logits, options), probabilities(logits, options)
    draws = [left.draw(race_seed(11, 0, place)) for place in range(6000)]
    assert (expected[draws] > 0).all()
    shuffled = np.random.default_rng(5).permutation(len(expected))
    ends = np.cumsum(expected[shuffled])
    classes = np.zeros(len(expected), np.int64)
    classes[shuffled] = np.minimum((24 * (ends - expected[shuffled])).astype(np.int64), 23)
    hoped = 6000 * np.bincount(classes, expected, 24)
    counts = np.bincount(classes[draws], minlength=24)
    used = hoped > 5
    assert (((counts - hoped) ** 2)[used] / hoped[used]).sum() < 58.6


def test_at_next_to_no_temperature_the_likeliest_is_drawn() -> None:
    logits = row("peaked")
    for options in ({}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 9000, "top_p": 0.99}):
        left = Distribution.of(logits, params(temperature=1e-300, **options))
        assert {left.draw(seed) for seed in range(20)} == {int(logits.argmax())}


def test_the_largest_negative_numbers_stand_for_minus_infinity() -> None:
    logits = row("flat")
    logits[5000:] = np.finfo(np.float32).min
    assert (probabilities(logits, params(top_p=0.9, temperature=0.5)) > 0).sum() < 5000


@pytest.mark.parametrize("top", [np.inf, -np.inf, np.nan])
def test_a_best_logit_that_is_not_finite_is_the_only_one_left(top: float) -> None:
    logits = np.full(9, -np.inf, np.float32)
    logits[4] = top
    expected = int(logits.argmax())
    for name in FILTERS:
        assert Distribution.of(logits, params(**FILTERS[name])).draw(7) == expected


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 8, 99])
def test_the_best_come_in_order_and_equal_ones_in_that_of_their_ids(count: int) -> None:
    logits = np.array([0.0, 2.0, -0.0, 2.0, -np.inf, 0.0, -1.5, -1.0], np.float32)
    assert best(logits, count).tolist() == [1, 3, 0, 2, 5, 7, 6, 4][:count]


# ---- penalties -------------------------------------------------------------------------------------------------------


def sequence_of(prompt: list[int], output: list[int], **options: object) -> Sequence:
    request = Request("r", prompt, params(max_tokens=999, **options), arrival=0, seed=7, max_tokens=999)
    request.sequences[0].token_ids += output
    return request.sequences[0]


def test_occurrences_are_those_of_the_whole_sequence_however_it_grew() -> None:
    tokens = np.random.default_rng(6).integers(0, 60, 300).tolist()
    found = Occurrences(100)
    for end in (100, 101, 102, 180, 181, 300):
        found.update(tokens[:end])
        assert dict(zip(found.tokens.tolist(), found.counts.tolist(), strict=True)) == {
            token: tokens[100:end].count(token) for token in set(tokens[:end])
        }


@pytest.mark.parametrize(("repetition", "presence", "frequency"), [(1.3, 0, 0), (0.7, 0.5, 0.3), (1.0, -1.1, 0.25)])
def test_penalties_change_the_tokens_that_occurred_to_the_bit_as_penalties_of_a_whole_row_do(
    repetition: float, presence: float, frequency: float
) -> None:
    rng = np.random.default_rng(8)
    prompt, output = rng.integers(0, 500, 120).tolist(), rng.integers(300, 900, 200).tolist()
    sequence = sequence_of(
        prompt, output, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    logits = row("masked", size=1000)
    seen = torch.zeros(1000, dtype=torch.bool)
    seen[prompt + output] = True
    times = torch.bincount(torch.tensor(output), minlength=1000).float()
    expected = torch.from_numpy(logits.copy())
    scaled = torch.where(expected > 0, expected / repetition, expected * repetition)
    expected = torch.where(seen, scaled, expected)
    expected = torch.where(times > 0, expected - (frequency * times + presence), expected)
    penalise(logits, sequence)
    assert (logits == expected.numpy()).all()


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_a_row_gives_the_same_token_alone_and_among_others_with_any_number_of_threads() -> None:
    logits = torch.from_numpy(np.stack([row(kind, seed=9) for kind in KINDS]))
    options = [{"top_p": 0.9}, {}, {"top_k": 40, "frequency_penalty": 0.5}, {"min_p": 0.01}, {"temperature": 2.0}]

    def sequences() -> list[Sequence]:
        return [sequence_of([1, 2, 3], [4, 5], **chosen) for chosen in options]

    sampler, greedy = Sampler(()), [0] * len(options)
    together = [d.token for d in sampler.draw(greedy, logits, [(s, 0) for s in sequences()])]
    for count in (1, 2):
        with threads(count):
            alone = [sampler.draw([0], logits[[i]], [(s, 0)])[0].token for i, s in enumerate(sequences())]
        assert alone == together
