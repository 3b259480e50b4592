"""KV bytes under policies, against a walk over explicit lanes that uses none of the closed forms."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.errors import InvalidInputError
from kvloom.spec.budget import pyramid_budgets
from kvloom.spec.catalogue import catalogue_spec
from kvloom.spec.footprint import held_bytes, request_footprint
from kvloom.spec.format import store_format
from kvloom.spec.kv import KVSpec, LayerKV
from kvloom.spec.policy import PolicySpec

FULL = (LayerKV(2, 16, 16), LayerKV(1, 32, 32), LayerKV(2, 16, 16, source=0))
TINY = (LayerKV(2, 16, 16), LayerKV(2, 16, 16, window=24), LayerKV(1, 32, 32), LayerKV(2, 16, 16, source=0))


def walk(kv, policy, held, seen):
    """Return the bytes of lanes that are filled token by token, blocks being encoded as they leave the residual."""
    total = 0
    for lane, layer in enumerate(kv.lane_layer):
        spec = kv.layers[layer]
        native = store_format(kv.store).block_bytes(kv.block_size, spec.k_width, spec.v_width)
        if spec.window is not None:
            alive = {position // kv.block_size for position in range(seen - held[lane], seen)}
            total += len(alive) * native
            continue
        blocks = []
        for token in range(held[lane]):
            if not blocks or blocks[-1][1] == kv.block_size:
                blocks.append([native, 0])
            blocks[-1][1] += 1
            if policy.store is None or policy.store.name == kv.store:
                continue
            encoded = store_format(policy.store.name).block_bytes(kv.block_size, spec.k_width, spec.v_width)
            pinned = -(-policy.store.number("sinks") // kv.block_size)
            for index, block in enumerate(blocks):
                if index >= pinned and (index + 1) * kv.block_size <= token + 1 - policy.store.number("residual"):
                    block[0] = encoded
        total += sum(size for size, _ in blocks)
    return total


STORES = st.sampled_from(
    ["", "+int8", "+int4(residual=0)", "+int4", "+int8(sinks=4,residual=20)", "+kivi4(residual=32)"]
)
SIZES = st.sampled_from([1, 8, 16, 32])


@settings(deadline=None)
@given(STORES, SIZES, st.integers(1, 300), st.data())
def test_bytes_of_given_lengths_equal_the_walk_over_lanes(store, block_size, seen, data):
    block_size = 32 if "kivi" in store else block_size
    kv = KVSpec(TINY, block_size, "bf16")
    policy = PolicySpec.parse("full" + store)
    held = data.draw(st.lists(st.integers(0, seen), min_size=kv.num_lanes, max_size=kv.num_lanes))
    held[2:4] = [max(1, n) for n in held[2:4]]  # a window is never empty
    assert held_bytes(kv, policy, held, seen) == walk(kv, policy, held, seen)


KNOWN = st.sampled_from(
    ["full", "snapkv(budget=64)", "random(keep=0.5)", "streaming(window=40)", "snapkv(budget=64)+pyramid"]
)


@settings(deadline=None)
@given(KNOWN, STORES, SIZES, st.integers(1, 300), st.integers(1, 64))
def test_known_lengths_are_planned_exactly_after_the_prompt(selector, store, block_size, prompt, chunk):
    block_size = 32 if "kivi" in store else block_size
    kv = KVSpec(FULL, block_size, "bf16")
    policy = PolicySpec.parse(selector + store)
    kept = [policy.tokens_kept(prompt)] * 2
    if policy.budget.name == "pyramid":
        kept = pyramid_budgets(64, 32, 2, prompt, 20.0)
    held = [kept[0]] * 2 + [kept[1]]
    planned = request_footprint(kv, policy, prompt, 10, chunk).settled
    assert (planned.low, planned.high) == (walk(kv, policy, held, prompt),) * 2


@settings(deadline=None)
@given(
    st.sampled_from(["full", "snapkv(budget=64)", "random(keep=0.5)"]), STORES, st.integers(1, 200), st.integers(1, 90)
)
def test_lanes_that_only_grow_are_planned_exactly_to_the_last_token(selector, store, prompt, output):
    kv = KVSpec(FULL, 32, "bf16")
    policy = PolicySpec.parse(selector + store)
    held = [policy.tokens_kept(prompt) + output] * kv.num_lanes
    planned = request_footprint(kv, policy, prompt, output, 512).end
    assert (planned.low, planned.high) == (walk(kv, policy, held, prompt + output),) * 2


def divide(draw, total, lanes, floor, most):
    """Return `lanes` random lengths from `floor` to `most` that sum to `total`."""
    lengths = [floor] * lanes
    left = total - floor * lanes
    for lane in draw(st.permutations(range(lanes))):
        others = (lanes - 1 - sum(n > floor for n in lengths)) * (most - floor)
        part = draw(st.integers(max(0, left - others), min(left, most - floor)))
        lengths[lane] += part
        left -= part
    for lane in range(lanes):
        part = min(left, most - lengths[lane])
        lengths[lane] += part
        left -= part
    return lengths


@settings(deadline=None)
@given(
    st.sampled_from(["adaptive", "global", "adaptive(floor=0.5)"]),
    STORES,
    st.integers(8, 200),
    st.integers(0, 60),
    st.data(),
)
def test_bounds_hold_for_every_way_in_which_heads_divide_a_budget(modifier, store, prompt, output, data):
    layers = (LayerKV(3, 16, 16), LayerKV(3, 16, 16))
    kv = KVSpec(layers, 32, "bf16")
    policy = PolicySpec.parse(f"random(keep=0.5)+{modifier}{store}")
    average = policy.tokens_kept(prompt)
    floor = int(average * policy.budget.get("floor"))
    if modifier == "global":
        held = divide(data.draw, 6 * average, 6, floor, prompt)
    else:
        held = [n for _ in range(2) for n in divide(data.draw, 3 * average, 3, floor, prompt)]
    planned = request_footprint(kv, policy, prompt, output, 64)
    assert planned.settled.low <= walk(kv, policy, held, prompt) <= planned.settled.high
    grown = [n + output for n in held]
    assert planned.end.low <= walk(kv, policy, grown, prompt + output) <= planned.end.high
    for step in range(0, output + 1, 7):
        assert walk(kv, policy, [n + step for n in held], prompt + step) <= planned.peak.high


@settings(deadline=None)
@given(
    st.sampled_from(["h2o(budget=40)", "h2o(budget=40)+slack(tokens=9)", "streaming(window=36)", "tova(keep=0.5)"]),
    STORES, st.integers(1, 120), st.integers(0, 150),
)  # fmt: skip
def test_bounds_hold_at_every_step_of_lanes_that_are_compacted_while_generating(selector, store, prompt, output):
    kv = KVSpec(FULL, 32, "bf16")
    policy = PolicySpec.parse(selector + store)
    goal = 40 if "keep" not in selector else policy.tokens_kept(prompt)
    slack = 9 if "slack" in selector else 0
    planned = request_footprint(kv, policy, prompt, output, 512)
    held = prompt if prompt <= goal + slack else goal
    if "slack" not in selector:
        held = min(prompt, goal)
    for seen in range(prompt, prompt + output):
        held += 1
        assert walk(kv, policy, [held] * kv.num_lanes, seen + 1) <= planned.peak.high
        if held > goal + slack:
            held = goal
    if output:
        assert planned.end.low <= walk(kv, policy, [held] * kv.num_lanes, prompt + output) <= planned.end.high


@given(st.integers(2, 40), st.integers(40, 4000), st.integers(0, 32), st.integers(1, 5000), st.integers(1, 40))
def test_a_pyramid_sums_to_its_budget_and_never_rises(num_layers, budget, window, prompt, beta):
    sizes = pyramid_budgets(budget, window, num_layers, prompt, float(beta))
    assert sum(sizes) == num_layers * min(budget, prompt)
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) <= prompt


def test_a_pyramid_over_a_prompt_below_twice_its_shared_budget_is_even():
    assert pyramid_budgets(600, 32, 30, 2 * (600 - 32) - 1, 20.0) == [600] * 30
    tilted = pyramid_budgets(600, 32, 30, 2 * (600 - 32), 20.0)
    assert (tilted[0], tilted[-1]) == (1136, 64)


def test_sixteen_requests_of_smollm2_at_budget_512_keep_a_quarter_of_their_prompt():
    kv = catalogue_spec("smollm2").kv_spec(16, "bf16")
    planned = request_footprint(kv, PolicySpec.parse("snapkv(budget=512)"), 2048, 64, 2048)
    assert 16 * planned.settled.high == 16 * 512 * 23_040
    assert planned.peak.high == 2048 * 23_040


def test_a_store_with_groups_refuses_a_block_size_that_cuts_them():
    kv = catalogue_spec("smollm2").kv_spec(16, "bf16")
    with pytest.raises(InvalidInputError, match="--block-size 32"):
        request_footprint(kv, PolicySpec.parse("kivi2"), 100, 10, 512)


def test_layers_that_a_policy_skips_keep_all_their_tokens():
    kv = catalogue_spec("smollm2").kv_spec(16, "bf16")
    planned = request_footprint(kv, PolicySpec.parse("knorm(budget=512,skip_layers=2)"), 2048, 64, 2048)
    assert planned.settled.high == (2 * 2048 + 28 * 512) * 23_040 // 30


def test_a_policy_that_acts_per_chunk_never_holds_the_whole_prompt():
    kv = catalogue_spec("smollm2").kv_spec(16, "bf16")
    planned = request_footprint(kv, PolicySpec.parse("h2o(budget=512)+chunk(tokens=256)+slack"), 20_000, 64, 2048)
    assert planned.peak.high == (512 + 256) * 23_040


def test_a_policy_that_waits_for_generated_tokens_keeps_the_prompt_until_then():
    kv = catalogue_spec("smollm2").kv_spec(16, "bf16")
    planned = request_footprint(kv, PolicySpec.parse("h2o(budget=512)+every(tokens=32)"), 1024, 64, 2048)
    assert planned.settled.high == 1024 * 23_040
    assert planned.peak.high == (1024 + 32) * 23_040
