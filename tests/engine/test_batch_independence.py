"""Greedy tokens do not depend on what else runs: alone, together, in another order, shared, preempted."""

import numpy as np
import pytest

from harness.tiny_engine import Margins, assert_same_unless_tied, finish, greedy, nothing_left, run, tiny_engine
from harness.tiny_model import batch_of, cache_of, random_tokens, random_weights, tiny_config
from kvloom.attention.reference import ReferenceBackend
from kvloom.engine.engine import Engine
from kvloom.models.decoder import Decoder

SHAPES = {"llama": {"num_heads": 4, "head_dim": 64}, "gemma3": {"num_heads": 2, "head_dim": 256}}
"""Wide heads: 3 KiB a token of llama, 2 KiB a token and layer of gemma3, so that one slab is little memory."""

NEW_TOKENS = 20


def engine(family: str, kind: str, **options: object) -> Engine:
    return tiny_engine(family, kind=kind, max_num_seqs=32, **{"slabs": 24, **SHAPES[family], **options})  # type: ignore[arg-type]


def prompts() -> list[list[int]]:
    """32 prompts of 1 to 90 tokens; some begin alike, two are the same."""
    rng = np.random.default_rng(5)
    beginnings = [random_tokens(int(n), seed=100 + i) for i, n in enumerate((0, 35, 64))]
    found = [beginnings[i % 3] + random_tokens(int(rng.integers(1, 27)), seed=i) for i in range(31)]
    return [*found, list(found[4])]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def alone(family: str) -> list[tuple[list[int], list[float]]]:
    """Tokens and margins of each prompt, by a plain loop over the decoder: no engine, one sequence, one cache each."""
    config = tiny_config(family, **SHAPES[family])
    decoder = Decoder(config, random_weights(config))
    answers = []
    for prompt in prompts():
        cache, tokens, margins = cache_of(decoder, slabs=1, sequences=1), list(prompt), []
        sequence = cache.lanes.open()
        while len(tokens) < len(prompt) + NEW_TOKENS:
            start = int(cache.lanes.seen[sequence])
            assert cache.lanes.extend(sequence, len(tokens) - start)
            hidden = decoder.forward(batch_of([(sequence, start, tokens[start:])]), cache, ReferenceBackend())
            best = decoder.logits(hidden[-1:])[0].topk(2)
            tokens.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
        answers.append((tokens[len(prompt) :], margins))
    return answers


def check(found: list[list[int]], expected: list[tuple[list[int], list[float]]]) -> None:
    for mine, (tokens, margins) in zip(found, expected, strict=True):
        assert_same_unless_tied(mine, tokens, margins)


Alone = list[tuple[list[int], list[float]]]


def test_requests_one_after_another_in_one_engine(family: str, alone: Alone) -> None:
    one = engine(family, "cpu", prefix=False)
    check([run(one, [prompt], greedy(NEW_TOKENS))[0] for prompt in prompts()], alone)
    nothing_left(one)


@pytest.mark.parametrize(("kind", "prefix"), [("eager", True), ("cpu", True), ("cpu", False)])
def test_thirty_two_requests_together(family: str, kind: str, prefix: bool, alone: Alone) -> None:
    together = engine(family, kind, prefix=prefix)
    check(run(together, prompts(), greedy(NEW_TOKENS)), alone)
    assert together.scheduler.num_preemptions == 0
    check(run(together, prompts(), greedy(NEW_TOKENS)), alone)  # and again, when every prompt is cached
    assert (together.scheduler.prefixes.hits > 0) == prefix
    nothing_left(together)


def test_another_order(family: str, alone: Alone) -> None:
    order = np.random.default_rng(1).permutation(32)
    found = run(engine(family, "cpu"), [prompts()[i] for i in order], greedy(NEW_TOKENS))
    check(found, [alone[i] for i in order])


@pytest.mark.parametrize("budget", [1, 7, 500])
def test_any_budget_of_tokens_a_step(family: str, budget: int, alone: Alone) -> None:
    chosen = range(0, 32, 5)
    one = engine(family, "cpu", max_num_batched_tokens=budget)
    check(run(one, [prompts()[i] for i in chosen], greedy(NEW_TOKENS)), [alone[i] for i in chosen])


@pytest.mark.parametrize(("kind", "prefix"), [("eager", True), ("cpu", True), ("cpu", False)])
def test_an_arena_so_small_that_requests_are_preempted(family: str, kind: str, prefix: bool, alone: Alone) -> None:
    small = engine(family, kind, prefix=prefix, slabs=1)
    requests = [small.add(prompt, greedy(NEW_TOKENS)) for prompt in prompts()]
    finish(small)
    check([request.sequences[0].output_token_ids for request in requests], alone)
    assert small.scheduler.num_preemptions > 0
    assert sum(r.sequences[0].num_preemptions for r in requests) == small.scheduler.num_preemptions
    nothing_left(small)


def test_requests_that_arrive_while_others_run(family: str, alone: Alone) -> None:
    one = engine(family, "cpu")
    requests = []
    for prompt in prompts():
        requests.append(one.add(prompt, greedy(NEW_TOKENS)))
        one.step()
    finish(one)
    check([request.sequences[0].output_token_ids for request in requests], alone)


def test_the_margin_of_every_token_is_what_makes_these_tests_sharp(alone: Alone) -> None:
    """Nearly all places must be decided by far more than a tie, or equal tokens would mean little."""
    margins = np.array([margin for _, of in alone for margin in of])
    assert (margins > 0.01).mean() > 0.97


def test_an_observer_sees_each_token_once_even_when_requests_are_preempted() -> None:
    small = engine("llama", "cpu", slabs=1)
    margins = Margins()
    small.continuation.observer = margins
    requests = [small.add(prompt, greedy(NEW_TOKENS)) for prompt in prompts()]
    finish(small)
    assert small.scheduler.num_preemptions > 0
    assert [len(margins.of[request]) for request in requests] == [NEW_TOKENS] * 32
