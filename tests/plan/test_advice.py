"""Advice: what fits by the planner's own arithmetic is offered, alone, as a pair, or with more devices."""

import pytest

from kvloom.plan import plan


def offered(found):
    """Return the flags of the advice that is enough."""
    return [advice.flags for advice in found.advice if advice.enough]


def test_weights_in_fp8_are_offered_where_the_device_multiplies_them():
    assert offered(plan("qwen3-14b", "rtx4090"))[0] == "--dtype float8_e4m3fn"
    assert plan("qwen3-14b", "rtx4090", dtype="float8_e4m3fn").memory.fits
    for device in ("rtx3090", "a100-80:24GiB", "cpu:24GiB"):  # without tensor cores for FP8
        found = plan("qwen3-14b", device, users=4, peak=300)
        assert found.advice and not any("float8" in advice.flags for advice in found.advice)


def test_fewer_devices_are_offered_together_with_a_change_that_makes_them_enough():
    found = plan("llama-3-70b", "a100-40", devices=2, users=10)
    assert "--gpu-memory-utilization 0.95 --devices 4" in offered(found)
    assert "--devices 8" in offered(found)
    assert not plan("llama-3-70b", "a100-40", devices=4, users=10).memory.fits
    assert plan("llama-3-70b", "a100-40", devices=4, users=10, gpu_memory_utilization=0.95).memory.fits


def test_two_changes_are_offered_where_no_single_one_is_enough():
    found = plan("llama-3-70b", "h100", users=16)
    single = [advice for advice in found.advice if ", and " not in advice.change and "device" not in advice.flags]
    pairs = [advice for advice in found.advice if ", and " in advice.change and "device" not in advice.flags]
    assert not any(advice.enough for advice in single)
    assert 0 < len(pairs) <= 3 and all(advice.enough for advice in pairs)
    evicting = next(advice for advice in pairs if "snapkv" in advice.flags)
    assert evicting.change.startswith("keep weights in FP8, and evict: keep ")
    policy = evicting.flags.split('"')[1]
    assert plan("llama-3-70b", "h100", users=16, dtype="float8_e4m3fn", kv_policy=policy).memory.fits


def test_no_pairs_are_offered_where_one_change_is_enough():
    assert not any(", and " in advice.change for advice in plan("llama-3-8b", "l40s", users=76).advice)


@pytest.mark.parametrize("users", [1, 49])
def test_nothing_is_offered_where_everything_fits(users):
    assert plan("llama-3-8b", "l40s", users=users).advice == []
