"""Attention over lanes equals its definition, in every store, on every instruction set."""

import numpy as np
import pytest
import torch

from harness.filled_lanes import FilledLanes, fill_lanes
from harness.threads import threads
from kvloom.errors import InvalidInputError
from kvloom.kernels import cpu, reference, reference_dense

FLOAT = 1e-5  # float32 sums in another order
BF16 = 3e-2  # queries and probabilities rounded to 8 bits of mantissa


def chunks(new: list[int]) -> np.ndarray:
    return np.cumsum([0, *new], dtype=np.int32)


def expected(filled: FilledLanes, b: int, q: torch.Tensor, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    first, count = filled.shape.lane_offset, filled.shape.num_kv_heads
    held = torch.from_numpy((filled.end - filled.begin)[b, first : first + count])
    return reference.attention(q.float(), filled.k[b], filled.v[b], held, 0.2, window)


@pytest.mark.parametrize("store", ["fp32", "bf16", "fp16", "int8", "fp8_e4m3"])
@pytest.mark.parametrize(("heads", "groups", "width"), [(9, 3, 64), (6, 2, 20), (8, 1, 128), (4, 1, 256)])
def test_attention_over_lanes_equals_its_definition(isa: str, store: str, heads: int, groups: int, width: int) -> None:
    filled = fill_lanes(store, heads, groups, width, [300, 17, 70])
    cu = chunks([1, 5, 70])
    q = torch.randn(76, heads, width)
    lse = torch.empty(76, heads)
    out = cpu.attention(filled.lanes, filled.shape, cu, filled.rows, q, 0.2, lse=lse)
    for b in range(3):
        want, want_lse = expected(filled, b, q[cu[b] : cu[b + 1]], None)
        torch.testing.assert_close(out[cu[b] : cu[b + 1]], want, atol=FLOAT, rtol=FLOAT)
        torch.testing.assert_close(lse[cu[b] : cu[b + 1]], want_lse, atol=FLOAT, rtol=FLOAT)


@pytest.mark.parametrize("store", ["bf16", "int8", "fp8_e4m3"])
def test_bf16_products_stay_close_to_the_definition(isa: str, store: str) -> None:
    filled = fill_lanes(store, 9, 3, 64, [300, 90])
    cu = chunks([1, 90])
    q = torch.randn(91, 9, 64).bfloat16()
    out = cpu.attention(filled.lanes, filled.shape, cu, filled.rows, q, 0.2)
    for b in range(2):
        want, _ = expected(filled, b, q[cu[b] : cu[b + 1]], None)
        torch.testing.assert_close(out[cu[b] : cu[b + 1]].float(), want, atol=BF16, rtol=BF16)


def test_a_window_and_ragged_lanes_hide_what_they_should(isa: str) -> None:
    filled = fill_lanes("fp32", 6, 3, 32, [200, 120], window=33)
    filled.begin[:, 2:5] = [[0, 21, 180], [5, 0, 64]]
    cu = chunks([1, 50])
    q = torch.randn(51, 6, 32)
    out = cpu.attention(filled.lanes, filled.shape, cu, filled.rows, q, 0.2)
    want, _ = expected(filled, 0, q[:1], 33)
    torch.testing.assert_close(out[:1], want, atol=FLOAT, rtol=FLOAT)


def test_freed_blocks_below_begin_are_never_read(isa: str) -> None:
    filled = fill_lanes("fp32", 2, 1, 32, [100])
    q = torch.randn(1, 2, 32)
    filled.begin[:, 2] = 48
    kept = cpu.attention(filled.lanes, filled.shape, chunks([1]), filled.rows, q, 0.2)
    filled.table[:, 2, :3] = -1
    torch.testing.assert_close(
        cpu.attention(filled.lanes, filled.shape, chunks([1]), filled.rows, q, 0.2), kept, atol=0, rtol=0
    )


@pytest.mark.parametrize("new", [1, 5, 60])
def test_softcap_slopes_bias_and_sinks_follow_their_definitions(isa: str, new: int) -> None:
    filled = fill_lanes("fp32", 6, 3, 32, [150])
    q = torch.randn(new, 6, 32)
    slopes, sinks = torch.rand(6) * 0.1, torch.randn(6)
    bias = torch.zeros(1, filled.table.shape[1], 176)
    bias[0, 2:5, :150] = torch.rand(3, 150)
    lse = torch.empty(new, 6)
    out = cpu.attention(
        filled.lanes, filled.shape, chunks([new]), filled.rows, q, 0.3, softcap=5.0, slopes=slopes, sinks=sinks,
        bias=bias, lse=lse,
    )  # fmt: skip
    want, want_lse = reference_dense.scored_attention(
        q, filled.k[0], filled.v[0], 0.3, softcap=5.0, slopes=slopes, sinks=sinks, bias=bias[0, 2:5, :150]
    )
    torch.testing.assert_close(out, want, atol=FLOAT, rtol=FLOAT)
    torch.testing.assert_close(lse, want_lse, atol=FLOAT, rtol=FLOAT)


@pytest.mark.parametrize("count", [1, 3])
def test_a_result_depends_on_neither_the_batch_nor_the_threads(isa: str, count: int) -> None:
    filled = fill_lanes("bf16", 9, 3, 64, [700, 33, 520])
    cu = chunks([1, 4, 90])
    q = torch.randn(95, 9, 64)
    together = cpu.attention(filled.lanes, filled.shape, cu, filled.rows, q, 0.2)
    with threads(count):
        alone = [
            cpu.attention(
                filled.lanes, filled.shape, chunks([last - first]), filled.rows[b : b + 1], q[first:last], 0.2
            )
            for b, (first, last) in enumerate(((0, 1), (1, 5), (5, 95)))
        ]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("rise", [20.0, 300.0])
def test_scores_may_rise_far_above_all_earlier_ones(isa: str, rise: float) -> None:
    filled = fill_lanes("fp32", 4, 2, 16, [1300])
    q = torch.randn(60, 4, 16)
    q[:, 1] *= rise  # one head of each lane has scores of another size
    lse = torch.empty(60, 4)
    out = cpu.attention(filled.lanes, filled.shape, chunks([60]), filled.rows, q, 0.2, lse=lse)
    want, want_lse = expected(filled, 0, q, None)
    torch.testing.assert_close(out, want, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(lse, want_lse, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_no_row_beside_it(isa: str, dtype: torch.dtype) -> None:
    filled = fill_lanes("bf16", 9, 3, 64, [1300])
    q = torch.randn(96, 9, 64).to(dtype)
    other = q.clone()
    other[:48] *= 3000
    other[50:, 1] = 0
    out, found = (cpu.attention(filled.lanes, filled.shape, chunks([96]), filled.rows, x, 0.2) for x in (q, other))
    assert torch.equal(found[48:50], out[48:50])
    assert torch.equal(found[50:, 3:], out[50:, 3:])


def mixed_lanes(native: str, runs: list[tuple[str, int]]) -> tuple[FilledLanes, cpu.Lanes, torch.Tensor, torch.Tensor]:
    """Lanes of 330 and 80 tokens: `runs` of (store, last column) in the second lane of the first sequence.

    "" is the native store. Returns native lanes, the mixed ones, and K and V [3, 330, 32] of the first sequence.
    """
    low = next(store for store, _ in runs if store)
    filled, coded = (fill_lanes(store, 6, 3, 32, [330, 80]) for store in (native, low))
    table, column = filled.table.copy(), 0
    k, v = filled.k[0].clone(), filled.v[0].clone()
    for store, last in runs:
        if store:
            table[0, 3, column:last] = coded.table[0, 3, column:last] + filled.arena.numel() // 128
            k[1, column * 16 : last * 16] = coded.k[0][1, column * 16 : last * 16]
            v[1, column * 16 : last * 16] = coded.v[0][1, column * 16 : last * 16]
        column = last
    lanes = cpu.Lanes(torch.cat((filled.arena, coded.arena)), table, filled.begin, filled.end, 16, native)
    start = np.array([0] * 4 + [len(runs)] * 9, np.int32)
    stores = np.array([int(bool(store)) for store, _ in runs], np.int32)
    lanes.set_segments(start, stores, np.array([last for _, last in runs], np.int32), ["", low])
    return filled, lanes, k, v


RUNS = [[("int8", 2)], [("", 1), ("fp8_e4m3", 9)], [("", 3), ("int8", 18), ("", 19), ("int8", 20)]]


@pytest.mark.parametrize("native", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("new", [1, 5, 70])
def test_a_lane_may_hold_runs_of_blocks_of_two_stores(
    isa: str, native: str, runs: list[tuple[str, int]], new: int
) -> None:
    filled, lanes, k, v = mixed_lanes(native, runs)
    cu = chunks([new, 1])
    q = torch.randn(new + 1, 6, 32)
    lse = torch.empty(new + 1, 6)
    out = cpu.attention(lanes, filled.shape, cu, filled.rows, q, 0.2, lse=lse)
    want, want_lse = reference.attention(q[:new], k, v, torch.full((3,), 330), 0.2)
    torch.testing.assert_close(out[:new], want, atol=FLOAT, rtol=FLOAT)
    torch.testing.assert_close(lse[:new], want_lse, atol=FLOAT, rtol=FLOAT)
    torch.testing.assert_close(out[new:], expected(filled, 1, q[new:], None)[0], atol=FLOAT, rtol=FLOAT)
    mass = cpu.key_mass(lanes, filled.shape, cu, filled.rows, q, lse, 0.2)
    want_mass = reference.key_mass(q[:new], k, torch.full((3,), 330), 0.2) * 2  # mean -> sum
    torch.testing.assert_close(mass[0], want_mass, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("runs", RUNS[1:])
@pytest.mark.parametrize("new", [1, 70])
def test_bf16_products_over_runs_of_two_stores_stay_close_to_the_definition(
    isa: str, new: int, runs: list[tuple[str, int]]
) -> None:
    filled, lanes, k, v = mixed_lanes("bf16", runs)
    q = torch.randn(new, 6, 32).bfloat16()
    out = cpu.attention(lanes, filled.shape, chunks([new]), filled.rows[:1], q, 0.2)
    want, _ = reference.attention(q.float(), k, v, torch.full((3,), 330), 0.2)
    torch.testing.assert_close(out.float(), want, atol=BF16, rtol=BF16)


@pytest.mark.parametrize("new", [1, 70])
def test_runs_do_not_make_a_result_depend_on_the_batch_or_the_threads(isa: str, new: int) -> None:
    filled, lanes, _, _ = mixed_lanes("bf16", RUNS[2])
    q = torch.randn(new + 1, 6, 32)
    together = cpu.attention(lanes, filled.shape, chunks([new, 1]), filled.rows, q, 0.2)
    with threads(3):
        alone = cpu.attention(lanes, filled.shape, chunks([new]), filled.rows[:1], q[:new], 0.2)
    assert torch.equal(alone, together[:new])


@pytest.mark.parametrize("store", ["fp32", "bf16", "int8"])
def test_key_mass_sums_the_attention_that_each_key_received(isa: str, store: str) -> None:
    filled = fill_lanes(store, 6, 3, 32, [150, 40])
    cu = chunks([40, 40])
    q = torch.randn(80, 6, 32)
    lse = torch.empty(80, 6)
    cpu.attention(filled.lanes, filled.shape, cu, filled.rows, q, 0.2, lse=lse)
    mass = cpu.key_mass(filled.lanes, filled.shape, cu, filled.rows, q, lse, 0.2)
    for b, length in enumerate([150, 40]):
        want = reference.key_mass(q[cu[b] : cu[b + 1]], filled.k[b], torch.full((3,), length), 0.2) * 2  # mean -> sum
        torch.testing.assert_close(mass[b, :, :length], want, atol=1e-4, rtol=1e-4)


def test_key_mass_of_several_layers_is_that_of_each(isa: str) -> None:
    """Two layers of equal lanes, given in another order than that of their queries, among three."""
    filled = fill_lanes("bf16", 8, 4, 32, [150, 40])
    shapes = {layer: cpu.LayerShape(4, 2, 32, 32, 2 + 2 * place, 0) for place, layer in enumerate((2, 0))}
    cu, q = chunks([40, 1]), torch.randn(3, 41, 4, 32)
    lse = torch.randn(3, 41, 4) + 5
    together = cpu.key_mass_of_layers(filled.lanes, shapes, cu, filled.rows, q, lse, 0.2)
    assert together.shape == (2, 2, 2, 150)
    for place, (layer, shape) in enumerate(shapes.items()):
        alone = cpu.key_mass(filled.lanes, shape, cu, filled.rows, q[layer], lse[layer], 0.2)
        assert torch.equal(together[place], alone) and alone.abs().max() > 0


def test_key_mass_of_unlike_layers_or_of_queries_that_are_not_there_is_refused() -> None:
    filled = fill_lanes("fp32", 4, 2, 32, [40])
    q, lse = torch.randn(1, 40, 4, 32), torch.randn(1, 40, 4)
    for shapes in ({1: filled.shape}, {0: filled.shape, 1: filled.shape._replace(num_kv_heads=1)}):
        with pytest.raises(InvalidInputError, match="layers 0 to 0 of equal heads and widths"):
            cpu.key_mass_of_layers(filled.lanes, shapes, chunks([40]), filled.rows, q, lse, 0.2)


def test_rope_and_head_norms_are_applied_to_queries_and_stored_keys(isa: str) -> None:
    filled = fill_lanes("fp32", 4, 2, 32, [40])
    q, k, v = torch.randn(7, 4, 32), torch.randn(7, 2, 32), torch.randn(7, 2, 32)
    q_norm, k_norm = torch.rand(32) + 0.5, torch.rand(32) + 0.5
    angles = torch.arange(7.0)[:, None] * torch.rand(16)[None]
    want_q = reference.apply_rope(reference.rms_norm(q, q_norm, 1e-6), angles.cos(), angles.sin())
    want_k = reference.apply_rope(reference.rms_norm(k, k_norm, 1e-6), angles.cos(), angles.sin())
    cpu.append(
        filled.lanes, filled.shape, chunks([7]), filled.rows, q, k, v,
        cos_sin=torch.cat((angles.cos(), angles.sin()), dim=1), q_norm=q_norm, k_norm=k_norm, eps=1e-6,
    )  # fmt: skip
    slots = np.arange(33, 40)
    stored, values = cpu.read_slots(
        filled.arena, "fp32", 16, filled.table[0, 2][slots // 16], slots % 16, (32, 32), torch.float32
    )
    torch.testing.assert_close(q, want_q, atol=FLOAT, rtol=FLOAT)
    torch.testing.assert_close(stored, want_k[:, 0], atol=FLOAT, rtol=FLOAT)
    assert torch.equal(values, v[:, 0])


@pytest.mark.parametrize("store", ["fp32", "bf16", "fp16", "int8", "fp8_e4m3"])
def test_moved_slots_decode_to_what_they_were(isa: str, store: str) -> None:
    filled = fill_lanes(store, 2, 1, 32, [100])
    keep = np.sort(np.random.default_rng(1).choice(100, 41, replace=False))
    column = filled.table[0, 2]
    to = np.arange(41)
    cpu.copy_slots(
        filled.arena, store, 16, (32, 32), (column[keep // 16], keep % 16), (column[to // 16], to % 16),
        np.array([0, 41]),
    )  # fmt: skip
    k, v = cpu.read_slots(filled.arena, store, 16, column[to // 16], to % 16, (32, 32), torch.float32)
    assert torch.equal(k, filled.k[0][0, keep])
    assert torch.equal(v, filled.v[0][0, keep])


def test_a_visible_column_without_a_block_is_refused() -> None:
    filled = fill_lanes("fp32", 2, 1, 32, [100])
    filled.table[0, 2, 3] = -1
    with pytest.raises(InvalidInputError, match="column 3 of a lane is visible but has no block"):
        cpu.attention(filled.lanes, filled.shape, chunks([1]), filled.rows, torch.randn(1, 2, 32), 0.2)


def test_more_new_tokens_than_slots_are_refused() -> None:
    filled = fill_lanes("fp32", 2, 1, 32, [10])
    with pytest.raises(InvalidInputError, match="do not hold its 11 new tokens"):
        cpu.attention(filled.lanes, filled.shape, chunks([11]), filled.rows, torch.randn(11, 2, 32), 0.2)
