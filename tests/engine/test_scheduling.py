"""Order of service, and release of all resources after errors."""

import pytest

from harness.tiny_engine import finish, greedy, letters, nothing_left, run, tiny_engine
from harness.tiny_model import random_tokens
from kvloom.engine.engine import Engine
from kvloom.engine.params import SamplingParams
from kvloom.engine.request import Request, Status
from kvloom.errors import DoesNotFitError, InvalidInputError

WIDE = {"num_heads": 4, "head_dim": 64}
"""3 KiB a token: 682 tokens a slab, 42 rows of blocks of 16 tokens in six lanes."""


def running(engine: Engine) -> list[str]:
    return [sequence.request.request_id for sequence in engine.scheduler.running]


# ---- one step --------------------------------------------------------------------------------------------------------


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    engine = tiny_engine(max_num_batched_tokens=32)
    short, long = engine.add([1, 2, 3], greedy(20)), engine.add(random_tokens(100), greedy(3))
    engine.step()
    assert (short.sequences[0].num_output_tokens, long.sequences[0].num_output_tokens) == (1, 0)
    seen = []
    for _ in range(4):
        engine.step()
        row = long.sequences[0].row
        assert row is not None
        seen.append(int(engine.cache.lanes.seen[row]))
    # 29 tokens fit beside the first prompt, 31 beside each decode
    assert seen == [60, 91, 100, 101] and short.sequences[0].num_output_tokens == 5


def test_a_step_never_runs_more_tokens_than_its_budget() -> None:
    engine = tiny_engine(max_num_batched_tokens=24)
    for place in range(8):
        engine.add(random_tokens(10 + place, seed=place), greedy(9))
    while engine.has_work:
        engine.step()
        assert 0 < engine.last_step.tokens <= 24


def test_more_requests_than_rows_wait_for_their_turn() -> None:
    engine = tiny_engine(max_num_seqs=2)
    requests = [engine.add([1, 2, place], greedy(3)) for place in range(5)]
    order: list[str] = []
    while engine.has_work:
        assert len(engine.scheduler.running) <= 2
        order += [r.request_id for r in engine.step() if r.finished]
    assert order == [r.request_id for r in requests]
    nothing_left(engine)


def test_lower_priority_numbers_run_first_and_equal_ones_in_order_of_arrival() -> None:
    engine = tiny_engine(max_num_seqs=1)
    for name, priority in (("a", 5), ("b", 0), ("c", 5), ("d", -1)):
        engine.add([1, 2, 3], greedy(1), request_id=name, priority=priority)
    order = []
    while engine.has_work:
        order += [r.request_id for r in engine.step()]
    assert order == ["d", "b", "a", "c"]


# ---- preemption ------------------------------------------------------------------------------------------------------


def test_the_request_that_would_be_served_last_is_preempted() -> None:
    engine = tiny_engine(slabs=1, prefix=False, **WIDE)  # 42 rows of blocks
    for name, priority in (("last", 9), ("first", 0), ("second", 1)):
        engine.add(random_tokens(200, seed=priority), greedy(60), request_id=name, priority=priority)
    ended = []
    while engine.has_work:
        ended += [r for r in engine.step() if r.finished]
        engine.cache.check_invariants()
    assert [r.request_id for r in ended] == ["first", "second", "last"]
    assert [r.sequences[0].num_preemptions > 0 for r in ended] == [False, False, True]


def test_a_preempted_request_finds_its_own_blocks_in_the_prefix_cache() -> None:
    engine = tiny_engine(slabs=1, **WIDE)
    computed = 0
    for place in range(3):
        engine.add(random_tokens(200, seed=place), greedy(60))
    while engine.has_work:
        engine.step()
        computed += engine.last_step.tokens
    assert engine.scheduler.num_preemptions > 0
    assert computed < 3 * 259 + 200 * engine.scheduler.num_preemptions


def test_the_first_request_always_gets_on_however_small_the_arena() -> None:
    engine = tiny_engine(slabs=1, prefix=False, max_num_seqs=32, **WIDE)
    requests = [engine.add(random_tokens(9, seed=place), greedy(100)) for place in range(12)]
    finish(engine)
    assert engine.scheduler.num_preemptions > 0
    assert all(r.sequences[0].num_output_tokens == 100 for r in requests)
    nothing_left(engine)


def test_a_request_that_fills_the_arena_to_its_last_block_runs() -> None:
    engine = tiny_engine(slabs=1, **WIDE)
    (tokens,) = run(engine, [random_tokens(600)], greedy(72))  # 672 tokens: 42 rows of blocks
    assert len(tokens) == 72
    with pytest.raises(DoesNotFitError, match="673 tokens need"):
        engine.add(random_tokens(600), greedy(73))
    nothing_left(engine)


def test_a_forked_request_that_no_longer_fits_finishes_one_sequence_after_another() -> None:
    engine = tiny_engine(slabs=1, **WIDE)
    request = engine.add(random_tokens(200), SamplingParams(n=4, max_tokens=150, ignore_eos=True, seed=1))
    finish(engine)
    assert engine.scheduler.num_preemptions > 0
    assert [s.num_output_tokens for s in request.sequences] == [150] * 4
    alone = tiny_engine(slabs=8, **WIDE)
    free = alone.add(random_tokens(200), SamplingParams(n=4, max_tokens=150, ignore_eos=True, seed=1))
    finish(alone)
    assert alone.scheduler.num_preemptions == 0
    assert [s.output_token_ids for s in request.sequences] == [s.output_token_ids for s in free.sequences]
    nothing_left(engine)


# ---- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_an_aborted_request_frees_its_blocks_at_once(steps: int) -> None:
    engine = tiny_engine(max_num_batched_tokens=20)
    request = engine.add(random_tokens(50), SamplingParams(n=3, max_tokens=20, ignore_eos=True))
    other = engine.add([5, 6, 7], greedy(12))
    for _ in range(steps):
        engine.step()
    output = engine.abort(request.request_id)
    assert output is not None and output.finished
    assert {o.finish_reason for o in output.outputs} == {"abort"}
    engine.cache.check_invariants()
    assert request.request_id not in running(engine)
    finish(engine)
    assert other.sequences[0].finish_reason == "length"
    assert engine.abort(request.request_id) is None
    nothing_left(engine)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("place", ["step", "logits of prompts", "sample", "append"])
def test_an_error_in_a_step_frees_everything_and_the_engine_goes_on(
    error: type[BaseException], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(max_num_batched_tokens=40, max_num_seqs=6, tokenizer=letters(), **WIDE)
    params = SamplingParams(n=2, max_tokens=30, ignore_eos=True, prompt_logprobs=1)
    victims = [engine.add(random_tokens(30, seed=i), params) for i in range(3)]
    waiting = engine.add([1, 2, 3], greedy(4), priority=9)
    for _ in range(2):
        engine.step()
    assert waiting.sequences[0].status is Status.WAITING

    def fail(*args: object, **kwargs: object) -> None:
        raise error("no")

    targets = {
        "step": (engine.runner.model, "step"),
        "logits of prompts": (engine.runner.model, "logits"),
        "sample": (engine.sampler, "draw"),
        "append": (engine.answers, "append"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*targets[place], fail)
        with pytest.raises(error):
            for _ in range(3):
                engine.step()
    engine.cache.check_invariants()
    stopped = [v for v in victims if v.sequences[0].finish_reason == "abort"]
    assert stopped
    for victim in stopped:
        assert all(s.finish_reason == "abort" and s.row is None for s in victim.sequences)
    finish(engine)
    assert waiting.sequences[0].finish_reason == "length"
    nothing_left(engine)


def test_an_error_while_rows_are_handed_out_leaves_no_row_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C can fall between any two lines, also where a waiting request has a row and does not run yet."""
    engine = tiny_engine()
    request = engine.add(random_tokens(30), greedy(4))

    def interrupted(sequence: int, num_tokens: int) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.cache.lanes, "extend", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    engine.abort(request.request_id)
    nothing_left(engine)


def test_eos_ends_a_sequence_and_ignore_eos_does_not() -> None:
    free = run(tiny_engine(), [[1, 2, 3]], greedy(12))[0]
    eos = free[5]
    first = free.index(eos)
    engine = tiny_engine(eos=(eos, 210))
    request = engine.add([1, 2, 3], SamplingParams(temperature=0, max_tokens=12))
    finish(engine)
    sequence = request.sequences[0]
    assert sequence.output_token_ids == free[: first + 1]
    assert (sequence.finish_reason, sequence.stop_reason) == ("stop", None)
    assert run(engine, [[1, 2, 3]], greedy(12))[0] == free
    nothing_left(engine)


def test_generation_ends_at_the_length_of_the_model() -> None:
    engine = tiny_engine(max_model_len=40)
    request = engine.add(random_tokens(30), SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    finish(engine)
    assert request.sequences[0].num_output_tokens == 10 and request.sequences[0].finish_reason == "length"
    with pytest.raises(InvalidInputError, match="the prompt has 40 tokens; the model's length is 40"):
        engine.add(random_tokens(40), greedy(1))


def test_a_request_id_is_used_once_at_a_time() -> None:
    engine = tiny_engine()
    engine.add([1, 2], greedy(1), request_id="mine")
    with pytest.raises(InvalidInputError, match="request id 'mine' is in use"):
        engine.add([1, 2], greedy(1), request_id="mine")
    finish(engine)
    again = engine.add([1, 2], greedy(1), request_id="mine")
    finish(engine)
    assert again.finished


def test_a_request_that_cannot_be_added_leaves_nothing_behind() -> None:
    engine = tiny_engine(slabs=1, max_model_len=5000, **WIDE)
    bad: list[tuple[list[int], SamplingParams, type[Exception]]] = [
        ([], greedy(1), InvalidInputError),
        ([211], greedy(1), InvalidInputError),
        ([-1], greedy(1), InvalidInputError),
        ([True], greedy(1), InvalidInputError),
        ([1.0], greedy(1), InvalidInputError),  # type: ignore[list-item]
        (["1"], greedy(1), InvalidInputError),  # type: ignore[list-item]
        ([1], greedy(1, logit_bias={211: 1.0}), InvalidInputError),
        ([1], greedy(1, stop_token_ids=[300]), InvalidInputError),
        ([1], SamplingParams(n=9), InvalidInputError),
        (random_tokens(2000), greedy(1), DoesNotFitError),
    ]
    for prompt, params, error in bad:
        with pytest.raises(error):
            engine.add(prompt, params)
    nothing_left(engine)


def test_wrong_types_of_options_are_named_when_the_request_comes_and_not_in_the_middle_of_a_step() -> None:
    engine = tiny_engine()
    for options in ({"cache_salt": 5}, {"priority": "high"}, {"priority": True}, {"request_id": 7}):
        with pytest.raises(InvalidInputError, match=next(iter(options))):
            engine.add([1, 2], greedy(1), **options)  # type: ignore[arg-type]
    nothing_left(engine)


def test_timing_and_counts_of_a_request_are_noted() -> None:
    engine = tiny_engine()
    request: Request = engine.add(random_tokens(20), greedy(5))
    finish(engine)
    assert (engine.num_prompt_tokens, engine.answers.num_generated_tokens, engine.num_arrived) == (20, 5, 1)
    assert engine.num_steps == 5 and engine.step_seconds > 0
    assert request.timing.started is not None
    assert request.timing.started <= request.timing.first_token <= request.timing.last_token  # type: ignore[operator]
