"""Every sampling parameter does what it says: on hand-made logits, and in an engine whose logits are recorded."""

import numpy as np
import pytest
import torch

from harness.tiny_engine import finish, greedy, letters, run, tiny_engine
from harness.tiny_model import random_tokens
from kvloom.engine.distribution import Distribution
from kvloom.engine.engine import Engine
from kvloom.engine.params import SamplingParams
from kvloom.engine.race import race_seed, uniforms
from kvloom.engine.request import Request, Sequence

PROMPT = random_tokens(20, seed=1)


class Recorder:
    """An observer that keeps the raw logits of every token of every sequence."""

    def __init__(self) -> None:
        self.of: dict[Sequence, list[np.ndarray]] = {}

    def __call__(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        for sequence, row in zip(sequences, logits, strict=True):
            self.of.setdefault(sequence, []).append(row.double().numpy().copy())


def recorded(
    prompt: list[int] = PROMPT, *, eos: tuple[int, ...] = (), **options: object
) -> tuple[Sequence, list[np.ndarray]]:
    """Return the first sequence of a request and the logits that each of its tokens was chosen from."""
    engine = tiny_engine(eos=eos)
    recorder = engine.continuation.observer = Recorder()
    request = engine.add(prompt, SamplingParams(**{"max_tokens": 25, "ignore_eos": not eos, **options}))  # type: ignore[arg-type]
    finish(engine)
    return request.sequences[0], recorder.of[request.sequences[0]]


def params(**options: object) -> SamplingParams:
    return SamplingParams(**options)  # type: ignore[arg-type]


def shares(logits: list[float], options: SamplingParams) -> np.ndarray:
    """Probability of each token."""
    left = Distribution.of(np.array(logits, np.float32), options)
    found = np.zeros(len(logits))
    found[slice(None) if left.tokens is None else left.tokens] = left.weights / left.weights.sum()
    return found


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


# ---- drawing ---------------------------------------------------------------------------------------------------------

LOGITS = [1.0, 3.0, -2.0, 2.0, 0.0]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_tokens_are_drawn_with_the_probabilities_of_the_softmax_at_the_temperature(temperature: float) -> None:
    expected = softmax(np.array(LOGITS) / temperature)
    assert np.abs(shares(LOGITS, params(temperature=temperature)) - expected).max() < 1e-3


@pytest.mark.parametrize("k", [1, 2, 4, 5, 99])
def test_top_k_leaves_the_k_most_likely_in_proportion(k: int) -> None:
    kept = np.argsort(LOGITS)[::-1][:k]
    expected = np.zeros(5)
    expected[kept] = softmax(np.array(LOGITS)[kept])
    assert np.abs(shares(LOGITS, params(top_k=k)) - expected).max() < 1e-3


@pytest.mark.parametrize("k", [0, -1])
def test_top_k_of_zero_or_minus_one_leaves_all(k: int) -> None:
    assert np.abs(shares(LOGITS, params(top_k=k)) - softmax(np.array(LOGITS))).max() < 1e-3


@pytest.mark.parametrize(("p", "kept"), [(0.3, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.999, 4), (1.0, 4)])
def test_top_p_leaves_the_smallest_set_that_reaches_p(p: float, kept: int) -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/8."""
    logits = np.log([0.125, 0.5, 0.125, 0.25])
    found = shares(logits.tolist(), params(top_p=p))
    assert (found > 0).sum() == kept and found[1] == pytest.approx({1: 1, 2: 2 / 3, 3: 4 / 7, 4: 0.5}[kept], abs=1e-3)


@pytest.mark.parametrize(("p", "kept"), [(0.0, 4), (0.2, 4), (0.26, 2), (0.49, 2), (0.51, 1), (1.0, 1)])
def test_min_p_leaves_what_is_at_least_that_share_of_the_most_likely(p: float, kept: int) -> None:
    found = shares(np.log([0.125, 0.5, 0.125, 0.25]).tolist(), params(min_p=p))
    assert (found > 0).sum() == kept


def test_min_p_looks_at_all_tokens_and_top_p_only_at_what_the_others_left() -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.1]).tolist()
    # of the two that top_k leaves, the first has 4/7 of the mass: enough for top_p
    assert (shares(logits, params(top_k=2, top_p=0.5)) > 0).tolist() == [True, False, False, False]
    # the first has 0.4 of all, but 0.4 / 0.9 of the three that min_p leaves
    assert (shares(logits, params(top_p=0.42)) > 0).tolist() == [True, True, False, False]
    assert (shares(logits, params(min_p=0.4, top_p=0.42)) > 0).tolist() == [True, False, False, False]


def test_temperature_comes_before_the_filters() -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.1]).tolist()
    assert (shares(logits, params(temperature=0.1, top_p=0.9)) > 0).sum() == 1
    assert (shares(logits, params(temperature=10.0, min_p=0.8)) > 0).sum() == 4


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = np.array([-np.inf, 1.0, 2.0, -np.inf], np.float32)
    for options in ({}, {"top_k": 3}, {"top_p": 0.9999}, {"min_p": 1e-9}, {"temperature": 1e-9}):
        left = Distribution.of(logits, params(**options))
        assert {left.draw(seed) for seed in range(200)} <= {1, 2}


def test_random_numbers_belong_to_seed_sequence_place_and_token_alone() -> None:
    seeds = (0, 1, -1, 2**63, 2**64 - 5)
    grid = [race_seed(seed, index, place) for seed in seeds for index in (0, 1) for place in (0, 1, 2)]
    assert len(set(grid)) == len(grid) and all(0 <= bits < 2**64 for bits in grid)
    assert race_seed(1, 2, 3) == race_seed(1 + 2**64, 2, 3)
    assert (uniforms(9, np.arange(5000))[[4999, 7]] == uniforms(9, np.array([4999, 7]))).all()
    # the first outputs of SplitMix64 from 1234567, as its authors' program prints them
    published = np.array([6457827717110365317, 3203168211198807973, 9817491932198370423], np.uint64)
    assert (uniforms(1234567, np.arange(3)) == (published // 2**12 + 0.5) / 2**52).all()
    token = np.array([0])
    by_place = np.concatenate([uniforms(race_seed(7, 0, place), token) for place in range(2000)])
    for many in (uniforms(7, np.arange(2000)), by_place):
        assert abs(many.mean() - 0.5) < 0.02 and abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 0.06


# ---- seeds -----------------------------------------------------------------------------------------------------------

HOT = {"temperature": 1.5, "max_tokens": 12, "ignore_eos": True}


def outputs(engine: Engine, requests: list[Request]) -> list[list[list[int]]]:
    finish(engine)
    return [[s.output_token_ids for s in request.sequences] for request in requests]


def test_a_seed_gives_the_same_tokens_whatever_runs_beside_it() -> None:
    alone = tiny_engine()
    ((first,),) = outputs(alone, [alone.add(PROMPT, params(seed=42, **HOT))])
    crowd = tiny_engine(slabs=1, max_num_batched_tokens=16, seed=5)
    for place in range(5):
        crowd.add(random_tokens(9 + place, seed=place), params(**HOT))
    request = crowd.add(PROMPT, params(seed=42, **HOT))
    for place in range(5):
        crowd.add(PROMPT, params(seed=place, **HOT))
    assert outputs(crowd, [request]) == [[first]]


def test_other_seeds_and_other_sequences_of_one_seed_give_other_tokens() -> None:
    engine = tiny_engine()
    requests = [engine.add(PROMPT, params(seed=seed, n=3, **HOT)) for seed in (0, 1)]
    found = outputs(engine, requests)
    assert len({tuple(tokens) for answers in found for tokens in answers}) == 6


def test_requests_without_a_seed_differ_and_follow_from_the_seed_of_the_engine() -> None:
    def two(seed: int) -> list[list[list[int]]]:
        engine = tiny_engine(seed=seed)
        return outputs(engine, [engine.add(PROMPT, params(**HOT)) for _ in range(2)])

    first, second = two(1)
    assert first != second and two(1) == [first, second] and two(2) != [first, second]


# ---- what changes logits ---------------------------------------------------------------------------------------------


def test_temperature_zero_takes_the_most_likely_token() -> None:
    sequence, logits = recorded(temperature=0)
    assert sequence.output_token_ids == [int(row.argmax()) for row in logits]


def test_top_k_of_one_is_greedy_at_any_temperature() -> None:
    assert recorded(temperature=2.0, top_k=1)[0].output_token_ids == recorded(temperature=0)[0].output_token_ids


def test_tokens_stay_within_top_k_and_move_beyond_it_without() -> None:
    def ranks(**options: object) -> list[int]:
        sequence, logits = recorded(temperature=3.0, seed=3, max_tokens=60, **options)
        return [int((row > row[t]).sum()) for row, t in zip(logits, sequence.output_token_ids, strict=True)]

    assert max(ranks(top_k=4)) == 3 and max(ranks()) > 20


def test_logit_bias_is_added_and_can_force_or_ban_a_token() -> None:
    sequence, logits = recorded(temperature=0, logit_bias={17: 3.0, 4: -5.0})
    bias = np.zeros(211)
    bias[17], bias[4] = 3.0, -5.0
    assert sequence.output_token_ids == [int((row + bias).argmax()) for row in logits]
    assert set(recorded(temperature=0, logit_bias={9: 100.0})[0].output_token_ids) == {9}
    free = recorded(temperature=0)[0].output_token_ids
    assert free[0] not in recorded(temperature=0, logit_bias={free[0]: -100.0})[0].output_token_ids


@pytest.mark.parametrize("penalty", [1.4, 3.0, 0.5])
def test_repetition_penalty_divides_and_multiplies_logits_of_prompt_and_output(penalty: float) -> None:
    sequence, logits = recorded(temperature=0, repetition_penalty=penalty)
    seen, expected = set(PROMPT), []
    for row, token in zip(logits, sequence.output_token_ids, strict=True):
        changed = row.copy()
        for i in seen:
            changed[i] = row[i] / penalty if row[i] > 0 else row[i] * penalty
        expected.append(int(changed.argmax()))
        seen.add(token)
    assert sequence.output_token_ids == expected
    assert sequence.output_token_ids != recorded(temperature=0)[0].output_token_ids


@pytest.mark.parametrize(("presence", "frequency"), [(2.0, 0.0), (0.0, 2.0), (1.5, 0.7), (-2.0, 0.0), (0.0, -2.0)])
def test_presence_and_frequency_penalties_look_at_the_output_only(presence: float, frequency: float) -> None:
    sequence, logits = recorded(
        temperature=0, presence_penalty=presence, frequency_penalty=frequency, logit_bias={5: 6.0, 7: 5.5}
    )
    counts, expected = np.zeros(211), []
    for row, token in zip(logits, sequence.output_token_ids, strict=True):
        changed = row - frequency * counts - presence * (counts > 0)
        changed[5] += 6.0
        changed[7] += 5.5
        expected.append(int(changed.argmax()))
        counts[token] += 1
    assert sequence.output_token_ids == expected
    assert len(set(sequence.output_token_ids)) < 25, "nothing was repeated, so nothing was tested"


# ---- ends ------------------------------------------------------------------------------------------------------------


def test_a_bias_comes_before_the_penalties_and_no_bias_frees_a_forbidden_token() -> None:
    token = PROMPT[0]
    engine = tiny_engine()
    options = {"repetition_penalty": 2.0, "logit_bias": {token: 6.0}, "allowed_token_ids": (token, 3), "min_tokens": 1}
    request = engine.add(PROMPT, greedy(1, stop_token_ids=(3,), **options))
    logits = np.full(211, 9.0, np.float32)
    logits[token] = -2.0
    changed = engine.sampler._adjusted(logits, request.sequences[0])
    assert changed[token] == (-2.0 + 6.0) / 2.0  # and not -2 * 2 + 6
    assert np.isneginf(changed).sum() == 210
    finish(engine)


def test_min_tokens_forbids_every_end_until_it_is_reached() -> None:
    free = recorded(temperature=0)[0].output_token_ids
    eos, stop = free[0], free[1]
    sequence, logits = recorded(temperature=0, eos=(eos,), stop_token_ids=[stop], min_tokens=6)
    early = sequence.output_token_ids[:6]
    assert eos not in early and stop not in early
    for row, token in zip(logits[:6], early, strict=True):
        allowed = row.copy()
        allowed[[eos, stop]] = -np.inf
        assert token == allowed.argmax()
    assert recorded(temperature=0, eos=(eos,))[0].output_token_ids == [eos]


def test_max_tokens_ends_with_length() -> None:
    sequence, _ = recorded(temperature=0, max_tokens=3)
    assert (sequence.num_output_tokens, sequence.finish_reason, sequence.stop_reason) == (3, "length", None)


def test_a_stop_token_ends_and_is_named_and_counted_but_not_spelled() -> None:
    free = run(tiny_engine(), [PROMPT], greedy(20))[0]
    stop = free[6]
    end = free.index(stop) + 1
    engine = tiny_engine(tokenizer=letters())
    request = engine.add(PROMPT, greedy(20, stop_token_ids=[stop]))
    finish(engine)
    (answer,) = engine.output(request).outputs
    assert answer.token_ids == free[:end]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert answer.text == "".join(f"{chr(97 + t % 26)}{t // 26}" for t in free[: end - 1])


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("characters", [(12, 14), (13, 15), (13, 19), (15, 16)])
def test_a_stop_string_ends_the_text_wherever_tokens_cut_it(characters: tuple[int, int], include: bool) -> None:
    """Tokens have two characters, so some of these lie across two, three or four of them."""
    free = run(tiny_engine(), [PROMPT], greedy(20))[0]
    text = "".join(f"{chr(97 + t % 26)}{t // 26}" for t in free)
    stop = text[slice(*characters)]
    at = text.index(stop)
    engine = tiny_engine(tokenizer=letters())
    request = engine.add(PROMPT, greedy(20, stop=[stop, "never"], include_stop_str_in_output=include))
    finish(engine)
    (answer,) = engine.output(request).outputs
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert answer.text == text[: at + len(stop) if include else at]
    assert answer.token_ids == free[: -(-(at + len(stop)) // 2)]


def test_a_stop_string_does_not_count_before_min_tokens() -> None:
    free = run(tiny_engine(), [PROMPT], greedy(20))[0]
    text = "".join(f"{chr(97 + t % 26)}{t // 26}" for t in free)
    engine = tiny_engine(tokenizer=letters())
    request = engine.add(PROMPT, greedy(20, stop=[text[2:5]], min_tokens=10))
    finish(engine)
    assert request.sequences[0].num_output_tokens >= 10
    assert engine.output(request).outputs[0].text.startswith(text[:20])


def test_text_held_back_for_a_stop_string_comes_out_at_the_end() -> None:
    free = run(tiny_engine(), [PROMPT], greedy(8))[0]
    text = "".join(f"{chr(97 + t % 26)}{t // 26}" for t in free)
    engine = tiny_engine(tokenizer=letters())
    request = engine.add(PROMPT, greedy(8, stop=[text[-3:] + "#"]))
    finish(engine)
    (answer,) = engine.output(request).outputs
    assert answer.text == text and answer.finish_reason == "length"
