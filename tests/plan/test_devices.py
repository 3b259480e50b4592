"""Several devices: every figure says what it covers, and sums are those of one device."""

import pytest

from kvloom.plan import plan


@pytest.mark.parametrize("model", ["llama-3-70b", "qwen3-next-80b-a3b"])
def test_every_figure_of_a_plan_for_two_devices_says_what_it_covers(model):
    found = plan(model, "h200", devices=2, users=4, compare="stores")
    figures = {**found.sizes, **found.limits, **found.speeds}
    rows = found.comparisons["stores"]
    figures |= {f"{row.name} {n}": f for row in rows for n, f in enumerate((row.bytes_per_token, row.kv_of_request))}
    assert [name for name, figure in figures.items() if "device" not in figure.note] == []
    alone = plan(model, "h200", users=4)
    assert not any("each device" in figure.note for figure in alone.sizes.values())


def test_the_bytes_of_a_token_are_those_of_a_device_where_those_of_a_request_are():
    whole, half = (plan("llama-3-70b", "h200", devices=devices, context=4096) for devices in (1, 2))
    assert whole.sizes["kv_per_token"].value == 327_680
    assert half.sizes["kv_per_token"].value == 163_840
    assert half.sizes["kv_per_request"].value == 4096 * 163_840


def test_kv_heads_that_are_fewer_than_devices_are_counted_on_each():
    assert plan("gemma-3-1b", "h200", devices=4).sizes["kv_per_token"].value == (
        plan("gemma-3-1b", "h200").sizes["kv_per_token"].value
    )


def test_recurrent_states_are_assumed_and_said_not_to_be_divided():
    one, two = (plan("qwen3-next-80b-a3b", "h200", devices=devices) for devices in (1, 2))
    for found in (one, two):
        labels = {found.sizes[name].label for name in ("state_per_request", "kv_total")}
        assert {*labels, found.speeds["decode_kv_bytes"].label} == {"assumed"}
        assert "dtype is the engine's choice" in found.sizes["state_per_request"].note
    assert two.sizes["state_per_request"].value == one.sizes["state_per_request"].value
    assert "not divided by devices" in two.sizes["state_per_request"].note
    assert "divided" not in one.sizes["state_per_request"].note
