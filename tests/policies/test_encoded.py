"""Requests whose policy has a store: bytes, tokens, sharing, admission and what is refused."""

import re

import numpy as np
import pytest
import torch

from harness.small_engine import GEMMA, prompt_of, run, small_engine
from harness.tiny_engine import greedy
from harness.tiny_model import FULL, LOCAL, random_weights, tiny_config, tiny_decoder
from kvloom.attention.reference import ReferenceBackend
from kvloom.engine.params import SamplingParams
from kvloom.errors import DoesNotFitError, UnsupportedError
from kvloom.models.compiled import CompiledModel
from kvloom.models.decoder import Decoder
from kvloom.models.eager import EagerModel
from kvloom.spec.footprint import held_bytes, request_footprint
from kvloom.spec.policy import PolicySpec
from kvloom.spec.store import SLAB_BYTES

P = 16
CONFIG = tiny_config("llama", num_heads=9, num_kv_heads=3, head_dim=64, layers=(FULL,) * 2, max_position=1 << 15)
"""The head shape of SmolLM2 in two layers: six lanes in blocks of 8,192 bytes, 2,176 in int8."""
NATIVE, INT8, LANES = 8192, 2176, 6


def spec(text):
    return PolicySpec.parse(text)


@pytest.fixture(scope="module")
def smol():
    return CompiledModel(CONFIG, random_weights(CONFIG).items(), torch.float32)


def walked(engine, row):
    """Return the bytes of the distinct blocks of a row, by what the arena says of each address."""
    table = engine.cache.lanes.table[row]
    return int(engine.cache.arena.block_bytes_at(np.unique(table[table >= 0])).sum())


@pytest.mark.parametrize(
    "text", ["int8", "fp8", "int8(residual=20)", "int8(sinks=20,residual=5)", "knorm(budget=40,skip_layers=1)+int8"]
)
def test_walked_bytes_are_the_planned_bytes_after_every_step(smol, text):
    engine = small_engine(model=smol, slabs=16, prefix=False)
    request = engine.add(prompt_of(100), greedy(40), kv_policy=spec(text))
    plan = request_footprint(engine.cache.spec, spec(text), 100, 40, 2048)
    first = []

    def compare():
        sequence = request.sequences[0]
        if sequence.row is None:
            return
        held, seen = engine.cache.lanes.held[sequence.row].tolist(), int(engine.cache.lanes.seen[sequence.row])
        assert walked(engine, sequence.row) == held_bytes(engine.cache.spec, spec(text), held, seen)
        assert walked(engine, sequence.row) == engine.cache.lanes.sequence_bytes(sequence.row)
        first.append(walked(engine, sequence.row))
        engine.cache.check_invariants()

    run(engine, [request], compare)
    assert len(first) == 39 and plan.settled.low == first[0] == plan.settled.high
    assert first[0] < LANES * 7 * NATIVE
    assert max(first) <= plan.decode.high
    assert engine.cache.arena.peak_bytes <= plan.peak.high


def test_the_arena_peaks_at_the_planned_peak_when_a_prompt_is_encoded(smol):
    engine = small_engine(model=smol, slabs=16, prefix=False)
    run(engine, [engine.add(prompt_of(160), greedy(2), kv_policy=spec("int8"))])
    plan = request_footprint(engine.cache.spec, spec("int8"), 160, 2, 2048)
    assert plan.peak.exact and engine.cache.arena.peak_bytes == plan.peak.high == LANES * (10 * NATIVE + 8 * INT8)


def scores(model, text, prompt, forced, **options):
    """Return the log-probabilities of forced tokens."""
    engine = small_engine(model=model, slabs=16, **options)
    request = engine.add(prompt, greedy(len(forced), logprobs=0), kv_policy=spec(text), forced_token_ids=forced)
    run(engine, [request])
    found = request.sequences[0].logprobs
    return np.array([entry[token].logprob for entry, token in zip(found, forced, strict=True)])


@pytest.mark.parametrize("store, most", [("int8", 0.3), ("fp8_e4m3", 1.0)])  # three bits of mantissa are coarser
def test_kernels_and_torch_read_the_same_encoded_blocks_and_other_ones_than_native(smol, store, most):
    prompt, forced = prompt_of(100), prompt_of(40, seed=1)
    eager = EagerModel(Decoder(CONFIG, random_weights(CONFIG)), ReferenceBackend())
    one, other, native = (scores(m, t, prompt, forced) for m, t in ((smol, store), (eager, store), (smol, "full")))
    # codes of sums that were taken in another order may differ by one
    assert np.abs(one - other).mean() < np.abs(one - native).mean() / 4
    assert one[0] == native[0], "the prompt's own logits come from 16 bit"
    assert (one[1:] != native[1:]).all() and np.abs(one - native).max() < most


@pytest.mark.parametrize("store", ["int8", "fp8_e4m3"])
def test_encoded_blocks_of_a_prefix_are_shared_by_requests_of_the_same_store_alone(smol, store):
    engine = small_engine(model=smol, slabs=16)
    prompt = prompt_of(100)
    run(engine, [engine.add(prompt, greedy(4), kv_policy=spec(store))])
    assert engine.cache.index.idle_bytes == LANES * 6 * INT8, "native copies are gone"
    again = engine.add(prompt + prompt_of(30, seed=2), greedy(4), kv_policy=spec(store))
    engine.step()
    assert again.sequences[0].num_cached_tokens == 96
    engine.cache.check_invariants()
    run(engine, [again])
    usage = engine.kv_usage(again)
    assert usage.cached_tokens == 96 and usage.note == f"the 96 tokens from the prefix cache were in {store}"
    engine.cache.index.clear()
    assert engine.cache.arena.used_bytes == 0


@pytest.mark.parametrize("text", ["full", "fp8", "int8(sinks=16)", "knorm(budget=40,skip_layers=0)+int8"])
def test_requests_of_another_store_do_not_read_encoded_blocks(smol, text):
    engine = small_engine(model=smol, slabs=16)
    run(engine, [engine.add(prompt_of(100), greedy(4), kv_policy=spec("int8"))])
    other = engine.add(prompt_of(100), greedy(1), kv_policy=spec(text))
    run(engine, [other], engine.cache.check_invariants)
    assert other.sequences[0].num_cached_tokens == 0


@pytest.mark.parametrize("store", ["int8", "fp8_e4m3"])
def test_lanes_with_a_window_stay_native_and_the_rest_is_planned_and_shared(store):
    engine = small_engine(GEMMA, slabs=16)
    prompt = prompt_of(100)
    request = engine.add(prompt, greedy(20), kv_policy=spec(store))
    plan = request_footprint(engine.cache.spec, spec(store), 100, 20, 2048)

    def compare():
        row = request.sequences[0].row
        if row is not None:
            assert walked(engine, row) == engine.cache.lanes.sequence_bytes(row)
            windowed = [x for g in engine.cache.spec.groups if g.window is not None for x in g.lanes]
            assert all(engine.cache.lanes.segments.is_native(row, lane) for lane in windowed)
            engine.cache.check_invariants()

    run(engine, [request], compare)
    assert engine.cache.arena.peak_bytes <= plan.peak.high
    again = engine.add(prompt, greedy(2), kv_policy=spec(store))
    run(engine, [again])
    assert again.sequences[0].num_cached_tokens == 96
    engine.cache.check_invariants()


def test_samples_of_one_prompt_share_its_encoded_blocks_and_encode_their_own(smol):
    engine = small_engine(model=smol, slabs=16, prefix=False)
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=40, n=3, ignore_eos=True)
    request = engine.add(prompt_of(64), params, kv_policy=spec("int8"))
    engine.step()
    assert engine.cache.bytes_in_use == LANES * 4 * INT8
    run(engine, [request], engine.cache.check_invariants)
    assert engine.cache.arena.used_bytes == 0


def test_more_encoded_requests_than_fit_in_16_bit_run_together(smol):
    slabs = 6
    room = slabs * SLAB_BYTES // (LANES * NATIVE * 22)  # of 352 tokens in 16 bit
    texts = [prompt_of(300, seed=i) for i in range(24)]
    engine = small_engine(model=smol, slabs=slabs, max_num_seqs=24, max_num_batched_tokens=300, prefix=False)
    requests = [engine.add(text, greedy(52), kv_policy=spec("int8")) for text in texts]
    running = []
    tokens = run(engine, requests, lambda: running.append(len(engine.scheduler.running)))
    assert max(running) > 2 * room and engine.scheduler.num_preemptions == 0
    alone = small_engine(model=smol, slabs=slabs, prefix=False)
    assert tokens[-1] == run(alone, [alone.add(texts[-1], greedy(52), kv_policy=spec("int8"))])[0]


def test_encoded_requests_are_preempted_and_replayed_with_the_tokens_that_they_have_elsewhere(smol):
    texts = [prompt_of(200, seed=i) for i in range(8)]
    kinds = ["full", "int8", "int8(sinks=20,residual=37)", "int8"] * 2
    engine = small_engine(model=smol, slabs=2, max_num_batched_tokens=200)
    requests = [engine.add(t, greedy(400), kv_policy=spec(k)) for t, k in zip(texts, kinds, strict=True)]
    tokens = run(engine, requests, engine.cache.check_invariants)
    assert sum(r.sequences[0].num_preemptions for r, kind in zip(requests, kinds, strict=True) if kind != "full") > 2
    roomy = small_engine(model=smol, slabs=16, prefix=False)
    again = [roomy.add(t, greedy(400), kv_policy=spec(k)) for t, k in zip(texts, kinds, strict=True)]
    assert run(roomy, again) == tokens and roomy.scheduler.num_preemptions == 0
    engine.cache.index.clear()
    assert engine.cache.arena.used_bytes == 0


def test_a_request_is_admitted_beside_encoded_ones_only_where_slabs_for_both_sizes_of_blocks_are_left(smol):
    engine = small_engine(model=smol, slabs=2, max_num_batched_tokens=200)
    requests = [engine.add(prompt_of(200, seed=i), greedy(400), kv_policy=spec("int8")) for i in range(8)]
    run(engine, requests)
    assert engine.scheduler.num_preemptions <= len(requests), "by bytes alone they were preempted 232 times"


def test_a_replay_takes_the_steps_between_encodings_and_ends_with_the_same_bytes_in_its_blocks(smol):
    engine = small_engine(model=smol, slabs=16, prefix=False)
    request = engine.add(prompt_of(100), greedy(60), kv_policy=spec("int8(residual=20)"))
    sequence = request.sequences[0]
    while sequence.num_output_tokens < 50:
        engine.step()
    before = [engine.cache.read_lane(sequence.row, lane) for lane in range(LANES)]
    engine.scheduler.queues.preempt(sequence)
    seen = []
    while sequence.num_output_tokens < 51:
        engine.step()
        seen.append(int(engine.cache.lanes.seen[sequence.row]))
    assert seen == [100, 116, 132, 148, 150], "the prompt, then until 20 tokens follow one more full block"
    for lane, (keys, values) in enumerate(before):
        again = engine.cache.read_lane(sequence.row, lane)
        assert torch.equal(again[0][: len(keys)], keys) and torch.equal(again[1][: len(values)], values)


def test_a_sequence_that_took_an_encoded_prefix_stays(smol):
    engine = small_engine(model=smol, slabs=16)
    first = engine.add(prompt_of(100), greedy(4), kv_policy=spec("int8"))
    engine.step()
    assert not engine.scheduler.capacity.stays(first.sequences[0])
    run(engine, [first])
    again = engine.add(prompt_of(100), greedy(4), kv_policy=spec("int8"))
    engine.step()
    assert again.sequences[0].num_cached_tokens == 96 and engine.scheduler.capacity.stays(again.sequences[0])


def test_the_store_of_the_engine_holds_for_every_policy_without_one(smol):
    engine = small_engine(model=smol, slabs=16, kv_store=spec("int8").store)
    for asked, method in ((None, "int8"), ("full", "int8"), ("knorm(budget=40,skip_layers=0)",) * 2):
        request = engine.add(prompt_of(100), greedy(20), kv_policy=None if asked is None else spec(asked))
        run(engine, [request])
        usage = engine.kv_usage(request)
        assert usage.method == (method if method == "int8" else f"{method}+int8")
        held = 119 if method == "int8" else 59
        blocks, encoded = -(-held // P), held // P
        bits = ((blocks - encoded) * NATIVE + encoded * INT8) * 8 / (blocks * P * 128)
        assert usage.bits_per_element == pytest.approx(bits)


KNORM = "knorm(budget=40,skip_layers=0)"


@pytest.mark.parametrize("text, method", [("fp32", "full"), (f"{KNORM}+fp32", KNORM)])
def test_a_request_that_names_the_store_of_the_model_keeps_its_blocks_as_they_are(smol, text, method):
    engine = small_engine(model=smol, slabs=16, kv_store=spec("int8").store)
    request = engine.add(prompt_of(100), greedy(20), kv_policy=spec(text))
    run(engine, [request])
    usage = engine.kv_usage(request)
    assert usage.method == method and usage.bits_per_element == 32


@pytest.mark.parametrize(
    "text, reason",
    [
        ("int4", "store int4 is planned only: it is not served yet"),
        ("bf16", "store bf16 is what a model of that dtype computes in; this one computes in fp32"),
        ("int8(encode=streaming)", "encode=streaming is planned only"),
        ("h2o(budget=40)+int8", "h2o evicts while generating, and encoded blocks lose no tokens"),
    ],
)
def test_what_is_not_served_is_refused_with_its_reason(smol, text, reason):
    with pytest.raises(UnsupportedError, match=re.escape(reason)):
        small_engine(model=smol).add([1, 2], greedy(1), kv_policy=spec(text))


def test_a_model_of_windows_alone_has_nothing_to_encode():
    engine = small_engine(tiny_decoder("gemma3", layers=(LOCAL, LOCAL)))
    with pytest.raises(UnsupportedError, match="every layer of this model has a window, whose blocks stay in 16 bit"):
        engine.add([1, 2], greedy(1), kv_policy=spec("int8"))


def test_a_prompt_that_does_not_fit_before_it_is_encoded_is_refused_with_numbers(smol):
    engine = small_engine(model=smol, slabs=3)
    engine.check(prompt_of(1400), greedy(1), None, spec("full"))
    with pytest.raises(DoesNotFitError, match="the request with int8: 1401 tokens need"):
        engine.check(prompt_of(1400), greedy(1), None, spec("int8"))
