"""The definition of attention beside dense attention in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.dense_attention import dense_attention
from harness.tolerances import ATTENTION_FLOAT32
from kvloom.kernels import reference


def attention_by_hand(q, k, v, held, scale, window, log_count):
    """Return (out [n, H, Dv], lse [n, H]) in float64, one query head at a time."""
    n, heads, _ = q.shape
    lanes, slots, v_width = v.shape
    out, lse = torch.zeros(n, heads, v_width, dtype=torch.float64), torch.zeros(n, heads, dtype=torch.float64)
    slot, newest = torch.arange(slots)[None], torch.arange(slots - n, slots)[:, None]
    for h in range(heads):  # the newest slot that a query sees is its own
        g = h // (heads // lanes)
        visible = (slot >= slots - held[g]) & (slot <= newest)
        if window is not None:
            visible &= newest - slot < window
        counts = None if log_count is None else log_count[g]
        out[:, h], lse[:, h] = dense_attention(q[:, h], k[g], v[g], visible, scale, counts)
    return out, lse


@settings(max_examples=40)
@given(st.data())
def test_attention_over_lanes_of_any_lengths_follows_the_formula(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 5), "new tokens")
    lanes, group = data.draw(st.integers(1, 3), "lanes"), data.draw(st.integers(1, 3), "group")
    held = [data.draw(st.integers(n, 12), "held") for _ in range(lanes)]
    slots = max(held) + data.draw(st.integers(0, 2), "padding")
    window = data.draw(st.none() | st.integers(1, 14), "window")
    width, v_width = data.draw(st.sampled_from([(2, 2), (4, 3), (6, 1)]), "widths")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000), "seed"))
    q = torch.randn(n, lanes * group, width, generator=generator)
    k = torch.randn(lanes, slots, width, generator=generator) * 2
    v = torch.randn(lanes, slots, v_width, generator=generator)
    log_count = torch.rand(lanes, slots, generator=generator) * 3 if data.draw(st.booleans(), "merged") else None
    out, lse = reference.attention(q, k, v, torch.tensor(held), 0.7, window, log_count)
    expected_out, expected_lse = attention_by_hand(q, k, v, held, 0.7, window, log_count)
    assert (out - expected_out).abs().max() < ATTENTION_FLOAT32
    assert (lse - expected_lse).abs().max() < ATTENTION_FLOAT32


def test_what_lies_in_padded_slots_does_not_matter() -> None:
    q, k, v = torch.randn(2, 2, 4), torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    held = torch.tensor([3, 6])
    before, _ = reference.attention(q, k, v, held, 0.5)
    k[0, :3], v[0, :3] = 1e4, torch.inf
    v[0, :3] = 1e30
    after, _ = reference.attention(q, k, v, held, 0.5)
    assert torch.equal(before, after)


def test_a_window_of_one_sees_only_itself() -> None:
    q, k, v = torch.randn(3, 1, 4), torch.randn(1, 7, 4), torch.randn(1, 7, 4)
    out, _ = reference.attention(q, k, v, torch.tensor([7]), 0.5, window=1)
    assert torch.allclose(out[:, 0], v[0, -3:], atol=ATTENTION_FLOAT32)


def test_an_entry_that_stands_for_c_tokens_weighs_as_c_equal_ones() -> None:
    q, k, v = torch.randn(1, 2, 4), torch.randn(1, 5, 4), torch.randn(1, 5, 4)
    repeated = [0, 0, 0, 1, 2, 2, 3, 4]
    expected, lse = reference.attention(q, k[:, repeated], v[:, repeated], torch.tensor([8]), 0.5)
    counts = torch.tensor([[3.0, 1.0, 2.0, 1.0, 1.0]])
    out, merged_lse = reference.attention(q, k, v, torch.tensor([5]), 0.5, None, counts.log())
    assert torch.allclose(out, expected, atol=ATTENTION_FLOAT32)
    assert torch.allclose(lse, merged_lse, atol=ATTENTION_FLOAT32)


def test_scores_far_apart_do_not_overflow() -> None:
    q = torch.full((1, 1, 4), 100.0)
    k = torch.stack([torch.full((4,), -100.0), torch.full((4,), 100.0)])[None]
    v = torch.tensor([[[1.0], [2.0]]])
    out, lse = reference.attention(q, k, v, torch.tensor([2]), 1.0)
    assert out.item() == 2.0 and lse.item() == pytest.approx(40000.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(*shape).to(dtype) for shape in ((3, 4, 8), (2, 40, 8), (2, 40, 8)))
    held = torch.tensor([40, 33])
    half, _ = reference.attention(q, k, v, held, 0.3)
    whole, _ = reference.attention(q.float(), k.float(), v.float(), held, 0.3)
    assert half.dtype == dtype and torch.equal(half, whole.to(dtype))
