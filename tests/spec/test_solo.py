"""The highest KV bytes of one request, against schedules that are walked step by step over explicit blocks."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.spec.catalogue import catalogue_spec
from kvloom.spec.footprint import request_footprint
from kvloom.spec.kv import KVSpec, LayerKV
from kvloom.spec.policy import PolicySpec
from kvloom.spec.solo import solo_peak

FULL = PolicySpec()
WINDOWS = st.one_of(st.none(), st.integers(1, 90))
LAYER = st.builds(LayerKV, st.integers(1, 3), st.just(16), st.just(16), window=WINDOWS)
LAYERS = st.lists(LAYER, min_size=1, max_size=4)
SIZES = st.sampled_from([1, 2, 3, 4, 8, 16, 32])


def highest(kv, steps):
    """Return the most bytes of lanes that take `steps` tokens a step: a lane frees and takes blocks when it is full."""
    lanes = [set() for _ in kv.lane_layer]
    seen = most = 0
    for tokens in steps:
        wanted = {slot // kv.block_size for slot in range(seen, seen + tokens)}
        for held, layer in zip(lanes, kv.lane_layer, strict=True):
            window = kv.layers[layer].window
            if wanted <= held:
                continue
            if window is not None:
                gone = {block for block in held if (block + 1) * kv.block_size <= seen - (window - 1)}
                held -= gone
            held |= wanted
        seen += tokens
        used = sum(len(held) * kv.layer_block_bytes(n) for held, n in zip(lanes, kv.lane_layer, strict=True))
        most = max(most, used)
    return most


def alone(prompt, output, chunk):
    """Return the tokens of each step of a request that runs alone."""
    whole = [chunk] * (prompt // chunk)
    rest = [prompt % chunk] if prompt % chunk else []
    return [*whole, *rest, *[1] * max(0, output - 1)]


@settings(deadline=None, max_examples=300)
@given(LAYERS, SIZES, st.integers(1, 400), st.integers(0, 120), st.integers(1, 130))
def test_the_peak_of_a_request_alone_is_the_highest_of_its_steps(layers, block_size, prompt, output, chunk):
    kv = KVSpec(tuple(layers), block_size, "bf16")
    assert solo_peak(kv, FULL, prompt, output, chunk) == highest(kv, alone(prompt, output, chunk))


@settings(deadline=None, max_examples=200)
@given(LAYERS, SIZES, st.integers(1, 300), st.integers(0, 60), st.integers(1, 90), st.data())
def test_no_way_to_cut_a_prompt_exceeds_what_admission_counts(layers, block_size, prompt, output, chunk, data):
    kv = KVSpec(tuple(layers), block_size, "bf16")
    steps = []
    while sum(steps) < prompt:
        steps.append(data.draw(st.integers(1, min(chunk, prompt - sum(steps)))))
    found = highest(kv, [*steps, *[1] * max(0, output - 1)])
    planned = request_footprint(kv, FULL, prompt, output, chunk).peak
    assert planned.low <= found <= planned.high


@settings(deadline=None, max_examples=200)
@given(LAYERS, SIZES, st.integers(1, 300), st.integers(0, 60), st.integers(1, 90))
def test_a_longer_prompt_never_has_a_lower_peak(layers, block_size, prompt, output, chunk):
    kv = KVSpec(tuple(layers), block_size, "bf16")
    assert solo_peak(kv, FULL, prompt, output, chunk) <= solo_peak(kv, FULL, prompt + 1, output, chunk)


def test_gemma_3_270m_holds_most_of_16000_tokens_in_its_last_whole_chunk():
    kv = catalogue_spec("gemma-3-270m").kv_spec(16, "fp32")
    found = solo_peak(kv, FULL, 16_000, 32, 2048)
    assert found == (3 * 896 + 15 * 160) * 16 * 2 * 256 * 4 == 166_723_584
    assert request_footprint(kv, FULL, 16_000, 32, 2048).peak.high > found


def test_a_prompt_of_a_billion_tokens_is_planned_without_walking_it():
    kv = catalogue_spec("gemma-3-270m").kv_spec(16, "bf16")
    found, bound = solo_peak(kv, FULL, 1 << 30, 1, 3), request_footprint(kv, FULL, 1 << 30, 1, 3).peak
    assert bound.low <= found <= bound.high


def test_where_the_data_decides_lengths_the_peak_is_not_known():
    kv = catalogue_spec("smollm2").kv_spec(16, "bf16")
    policy = PolicySpec.parse("h2o(budget=64)+every(tokens=300)")
    assert solo_peak(kv, PolicySpec.parse("random(budget=30)+adaptive+every(tokens=9)"), 20, 400, 512) is None
    assert solo_peak(kv, policy, 1000, 4, 512) == kv.request_bytes(1003)
