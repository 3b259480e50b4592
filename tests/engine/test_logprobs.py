"""Log-probabilities of output and prompt, forced continuations, and the observer of logits."""

import pytest
import torch

from harness.tiny_engine import finish, greedy, nothing_left, tiny_engine
from harness.tiny_model import cache_of, feed, random_tokens, tiny_decoder
from harness.tolerances import LOGITS_SAME_WEIGHTS, LOGPROB_FLOAT32
from kvloom.engine import runner
from kvloom.engine.engine import Engine
from kvloom.engine.params import SamplingParams
from kvloom.engine.request import Logprob, Request
from kvloom.errors import InvalidInputError

PROMPT = random_tokens(90, seed=2)
KINDS = pytest.mark.parametrize("kind", ["eager", "cpu"])


def expected_logprobs(tokens: list[int]) -> torch.Tensor:
    """log_softmax [n, V] of the decoder over all of `tokens` at once."""
    decoder = tiny_decoder("llama")
    cache = cache_of(decoder, sequences=1)
    return torch.log_softmax(feed(decoder, cache, cache.lanes.open(), tokens).double(), -1)


def check_entry(entry: dict[int, Logprob], row: torch.Tensor, chosen: int, count: int) -> None:
    """The `count` best tokens in order, and the chosen one, each with its log-probability and rank."""
    best = row.topk(count).indices.tolist()
    assert list(entry)[:count] == best
    assert set(entry) == {*best, chosen}
    for token, found in entry.items():
        assert found.logprob == pytest.approx(float(row[token]), abs=LOGPROB_FLOAT32 + LOGITS_SAME_WEIGHTS)
        assert found.rank == int((row > row[token]).sum()) + 1


def done(engine: Engine, prompt: list[int], params: SamplingParams, **options: object) -> Request:
    request = engine.add(prompt, params, **options)  # type: ignore[arg-type]
    finish(engine)
    return request


# ---- of the output ---------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs_are_the_log_softmax_of_the_raw_logits(kind: str, count: int) -> None:
    """Raw: before temperature, bias, penalties and filters, as everybody returns them."""
    params = SamplingParams(
        temperature=1.7, seed=1, top_k=50, logit_bias={3: 4.0}, repetition_penalty=1.3, max_tokens=20, logprobs=count
    )
    request = done(tiny_engine(kind=kind), PROMPT, params)
    sequence = request.sequences[0]
    rows = expected_logprobs(sequence.token_ids[:-1])[len(PROMPT) - 1 :]
    assert len(sequence.logprobs) == 20
    for entry, row, token in zip(sequence.logprobs, rows, sequence.output_token_ids, strict=True):
        check_entry(entry, row, token, count)
    assert any(token not in row.topk(5).indices for row, token in zip(rows, sequence.output_token_ids, strict=True))
    total = sum(entry[token].logprob for entry, token in zip(sequence.logprobs, sequence.output_token_ids, strict=True))
    assert sequence.cumulative_logprob == pytest.approx(total)


def test_more_logprobs_than_tokens_are_all_tokens() -> None:
    request = done(tiny_engine(), PROMPT, greedy(1, logprobs=500))
    (entry,) = request.sequences[0].logprobs
    assert len(entry) == 211
    assert sum(torch.tensor([found.logprob for found in entry.values()]).exp()) == pytest.approx(1, abs=1e-5)


def test_no_logprobs_are_kept_unless_asked_for() -> None:
    engine = tiny_engine()
    (answer,) = engine.output(done(engine, PROMPT, greedy(2))).outputs
    assert answer.logprobs is None and answer.cumulative_logprob is None


# ---- of the prompt ---------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("budget", [7, 64, 500])
def test_prompt_logprobs_are_the_log_softmax_at_every_token_but_the_first(kind: str, budget: int) -> None:
    engine = tiny_engine(kind=kind, max_num_batched_tokens=budget)
    engine.add(random_tokens(30, seed=5), greedy(8))  # something beside it
    request = done(engine, PROMPT, greedy(3, prompt_logprobs=4))
    found = engine.output(request).prompt_logprobs
    assert found is not None and len(found) == 90 and found[0] is None
    rows = expected_logprobs(PROMPT)
    for place in range(1, 90):
        entry = found[place]
        assert entry is not None
        check_entry(entry, rows[place - 1], PROMPT[place], 4)


def test_prompt_logprobs_of_a_single_token_are_one_none() -> None:
    engine = tiny_engine()
    assert engine.output(done(engine, [5], greedy(1, prompt_logprobs=2))).prompt_logprobs == [None]


def test_prompt_logprobs_are_whole_though_the_prompt_is_cached() -> None:
    engine = tiny_engine()
    first = done(engine, PROMPT, greedy(1, prompt_logprobs=0)).prompt_logprobs
    again = done(engine, PROMPT, greedy(1, prompt_logprobs=0))
    assert engine.output(again).num_cached_tokens == 0  # a hit would leave nothing to compute them from
    assert again.prompt_logprobs == first


def test_prompt_logprobs_are_complete_and_in_order_after_a_preemption() -> None:
    engine = tiny_engine(slabs=1, max_num_batched_tokens=64, num_heads=4, head_dim=64)  # 42 rows of 16 tokens
    engine.add(random_tokens(250, seed=1), greedy(200), priority=0)
    victim = engine.add(random_tokens(300, seed=2), greedy(60, prompt_logprobs=0), priority=1)
    finish(engine)
    assert victim.sequences[0].num_preemptions > 0
    alone = tiny_engine(slabs=8, num_heads=4, head_dim=64)
    expected = done(alone, random_tokens(300, seed=2), greedy(1, prompt_logprobs=0)).prompt_logprobs
    assert victim.prompt_logprobs is not None and expected is not None
    assert len(victim.prompt_logprobs) == 300
    for mine, other, token in zip(
        victim.prompt_logprobs[1:], expected[1:], random_tokens(300, seed=2)[1:], strict=True
    ):
        assert mine is not None and other is not None
        assert mine[token].logprob == pytest.approx(other[token].logprob, abs=LOGITS_SAME_WEIGHTS)


@KINDS
def test_the_matrix_of_all_prompt_logits_never_exists(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(kind=kind, max_num_batched_tokens=500)
    monkeypatch.setattr(runner, "LOGITS_TILE_BYTES", 8 * 4 * 211)
    rows: list[int] = []
    honest = engine.runner.model.logits

    def watched(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return honest(hidden)

    monkeypatch.setattr(engine.runner.model, "logits", watched)
    request = done(engine, PROMPT, greedy(1, prompt_logprobs=1))
    assert request.prompt_logprobs is not None and len(request.prompt_logprobs) == 90
    assert rows == [8] * 11 + [1]


def test_a_tile_of_the_largest_vocabulary_is_64_rows() -> None:
    assert runner.LOGITS_TILE_BYTES // (4 * 262_144) == 64


# ---- forced continuations --------------------------------------------------------------------------------------------


@KINDS
def test_a_forced_continuation_goes_through_the_decode_path_token_by_token(kind: str) -> None:
    forced = random_tokens(25, seed=8)
    engine = tiny_engine(kind=kind, eos=(forced[3],))
    steps = []
    request = engine.add(PROMPT[:40], SamplingParams(logprobs=2, stop_token_ids=[forced[5]]), forced_token_ids=forced)
    while engine.has_work:
        engine.step()
        steps.append(engine.last_step.tokens)
    assert steps == [40] + [1] * 24
    sequence = request.sequences[0]
    assert sequence.output_token_ids == forced and sequence.finish_reason == "length"  # no end but its own
    rows = expected_logprobs([*PROMPT[:40], *forced[:-1]])[39:]
    for entry, row, token in zip(sequence.logprobs, rows, forced, strict=True):
        check_entry(entry, row, token, 2)
    nothing_left(engine)


@KINDS
def test_an_observer_meets_the_logits_of_every_forced_token_in_order(kind: str) -> None:
    forced = random_tokens(10, seed=8)
    engine, found = tiny_engine(kind=kind), []

    def watch(sequences, logits):
        found.append((sequences[0].num_output_tokens, logits[0].double()))

    engine.continuation.observer = watch
    done(engine, PROMPT[:40], SamplingParams(), forced_token_ids=forced)
    rows = expected_logprobs([*PROMPT[:40], *forced[:-1]])[39:]
    assert [place for place, _ in found] == list(range(10))
    for (_, logits), row in zip(found, rows, strict=True):
        assert (torch.log_softmax(logits, -1) - row).abs().max() < LOGITS_SAME_WEIGHTS


def test_forcing_survives_preemption() -> None:
    engine = tiny_engine(slabs=1, num_heads=4, head_dim=64)
    forced = [random_tokens(150, seed=10 + i) for i in range(4)]
    requests = [engine.add([1, 2, i], SamplingParams(logprobs=0), forced_token_ids=f) for i, f in enumerate(forced)]
    for place in range(3):
        engine.add(random_tokens(100, seed=place), greedy(100), priority=-1)
    finish(engine)
    assert engine.scheduler.num_preemptions > 0
    assert [r.sequences[0].output_token_ids for r in requests] == forced
    assert [len(r.sequences[0].logprobs) for r in requests] == [150] * 4


@pytest.mark.parametrize("forced", [[], [211], list(range(30))])
def test_a_forced_continuation_that_is_empty_too_long_or_not_of_this_model_is_refused(forced: list[int]) -> None:
    engine = tiny_engine(max_model_len=30)
    with pytest.raises(InvalidInputError, match=r"a forced continuation has 1 to 28|211 is not a token id"):
        engine.add([1, 2], SamplingParams(), forced_token_ids=forced)
    with pytest.raises(InvalidInputError, match="n=1"):
        engine.add([1, 2], SamplingParams(n=2), forced_token_ids=[1])
    nothing_left(engine)
