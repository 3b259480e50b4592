"""Stores: what is written comes back, in every slot of every block, and nothing else changes."""

import numpy as np
import pytest
import torch

from kvloom.cache.memory import ArenaMemory
from kvloom.cache.stores.codec import Int8Codec
from kvloom.cache.stores.rows import RowStore
from kvloom.cache.stores.store import Store
from kvloom.spec.store import GRANULE_BYTES, NATIVE_STORE, SLAB_BYTES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def memory() -> ArenaMemory:
    return ArenaMemory(SLAB_BYTES, torch.device("cpu"))


def native(dtype: torch.dtype, where: ArenaMemory, block_size: int) -> Store:
    return RowStore(NATIVE_STORE[str(dtype).removeprefix("torch.")], dtype, where, block_size)


def int8(dtype: torch.dtype, where: ArenaMemory, block_size: int) -> Store:
    return RowStore("int8", dtype, where, block_size)


def stores(dtype: torch.dtype, block_size: int, where: ArenaMemory) -> list[Store]:
    e4m3 = RowStore("fp8_e4m3", dtype, where, block_size)
    return [native(dtype, where, block_size), int8(dtype, where, block_size), e4m3]


def addresses(store: Store, k_width: int, v_width: int, numbers: list[int]) -> np.ndarray:
    return np.array(numbers, np.int32) * (store.block_bytes(k_width, v_width) // GRANULE_BYTES)


def rows(count: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k_width", "v_width"), [(64, 64), (32, 96), (576, 0)])
@pytest.mark.parametrize("block_size", [1, 16])
def test_the_native_store_gives_back_every_bit(dtype: torch.dtype, k_width: int, v_width: int, block_size: int) -> None:
    store = native(dtype, memory(), block_size)
    blocks = addresses(store, k_width, v_width, [5, 0, 3])
    k, v = rows(3 * block_size, k_width, dtype, 1), rows(3 * block_size, v_width, dtype, 2)
    order = np.random.default_rng(0).permutation(3 * block_size)  # slots may be filled in any order
    store.write(blocks[order // block_size], order % block_size, k[order], v[order])
    got_k, got_v = store.read(blocks, k_width, v_width)
    assert got_k.shape == (3, block_size, k_width) and got_v.shape == (3, block_size, v_width)
    assert torch.equal(got_k.flatten(0, 1), k) and torch.equal(got_v.flatten(0, 1), v)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_write_leaves_other_slots_and_other_blocks_alone(number: int) -> None:
    where = memory()
    store = stores(torch.float32, 4, where)[number]
    everywhere = addresses(store, 8, 16, [0, 1, 2])
    k, v = rows(12, 8, torch.float32, 1), rows(12, 16, torch.float32, 2)
    store.write(np.repeat(everywhere, 4), np.tile(np.arange(4), 3), k, v)
    before_k, before_v = (t.clone() for t in store.read(everywhere, 8, 16))
    store.write(everywhere[1:2], np.array([2]), torch.full((1, 8), 7.0), torch.full((1, 16), -7.0))
    after_k, after_v = store.read(everywhere, 8, 16)
    changed = torch.zeros(3, 4, dtype=torch.bool)
    changed[1, 2] = True
    assert ((after_k != before_k).any(-1) == changed).all() and ((after_v != before_v).any(-1) == changed).all()
    assert after_k[1, 2].allclose(torch.tensor(7.0)) and after_v[1, 2].allclose(torch.tensor(-7.0))


def test_int8_codes_are_off_by_at_most_half_a_step_per_token() -> None:
    x = rows(50, 64, torch.float32, 3) * torch.logspace(-6, 6, 50)[:, None]
    codes, scale = Int8Codec().encode(x)
    assert torch.equal(scale, x.abs().amax(1) / 127)
    assert codes.abs().amax(1).eq(127).all()  # the largest element uses the whole range
    error = (codes.float() * scale[:, None] - x).abs()
    assert (error <= scale[:, None] * 0.5001).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_int8_store_decodes_codes_times_scale_of_each_side(dtype: torch.dtype) -> None:
    store = int8(dtype, memory(), 4)
    blocks = addresses(store, 8, 16, [2, 0])
    k, v = rows(8, 8, dtype, 1) * 3, rows(8, 16, dtype, 2) / 5
    store.write(np.repeat(blocks, 4), np.tile(np.arange(4), 2), k, v)
    got = store.read(blocks, 8, 16)
    for side, original in zip(got, (k, v), strict=True):
        x = original.float().numpy()
        scale = (np.abs(x).max(axis=1) / np.float32(127)).astype(np.float32)
        expected = np.rint(x / scale[:, None]) * scale[:, None]
        assert torch.equal(side.flatten(0, 1), torch.from_numpy(expected).to(dtype))


def test_the_bytes_of_an_int8_block_are_codes_then_scales() -> None:
    where = memory()
    store = int8(torch.float32, where, 2)
    k, v = torch.tensor([[127.0, -127.0], [1.0, 0.5]]), torch.tensor([[254.0, 0.0], [-127.0, 12.0]])
    store.write(np.zeros(2, np.int32), np.arange(2), k, v)
    content = where.load(np.zeros(1, np.int32), 128)[0].numpy()
    assert content[:8].view(np.int8).tolist() == [127, -127, 127, 64, 127, 0, -127, 12]
    assert content[8:24].view(np.float32).tolist() == [1.0, np.float32(1 / 127), 2.0, 1.0]


def test_a_zero_vector_decodes_to_zeros_and_not_to_nan() -> None:
    store = int8(torch.float32, memory(), 4)
    blocks = addresses(store, 8, 8, [0])
    store.write(np.repeat(blocks, 4), np.arange(4), torch.zeros(4, 8), torch.ones(4, 8))
    k, v = store.read(blocks, 8, 8)
    assert torch.equal(k, torch.zeros(1, 4, 8)) and torch.equal(v, torch.ones(1, 4, 8))


def test_vectors_near_the_smallest_and_largest_numbers_survive_int8() -> None:
    store = int8(torch.float32, memory(), 4)
    blocks = addresses(store, 8, 8, [0])
    tiny, huge = torch.finfo(torch.float32).tiny, 3e38
    k = torch.stack([torch.full((8,), x) for x in (tiny / 64, tiny, -huge, huge)])
    store.write(np.repeat(blocks, 4), np.arange(4), k, k)
    got, _ = store.read(blocks, 8, 8)
    assert torch.isfinite(got).all()
    assert torch.allclose(got[0, 1:], k[1:], rtol=1e-5) and (got[0, 0].abs() <= tiny).all()


def test_the_int8_store_holds_lanes_without_v() -> None:
    store = int8(torch.float32, memory(), 4)
    blocks = addresses(store, 12, 0, [1])
    assert store.block_bytes(12, 0) == 128  # 4 x 12 codes + 4 scales of 4 bytes
    k = rows(4, 12, torch.float32, 1)
    store.write(np.repeat(blocks, 4), np.arange(4), k, k[:, :0])
    got, empty = store.read(blocks, 12, 0)
    assert (got[0] - k).abs().max() < k.abs().max() / 250 and empty.shape == (1, 4, 0)


def test_int8_refuses_widths_whose_scales_would_not_be_aligned() -> None:
    store = int8(torch.float32, memory(), 1)
    assert store.unsupported(3, 3) == [
        "int8 scales follow the codes at multiples of 4 bytes; 1 x (3 + 3) bytes of codes are none"
    ]
    assert store.unsupported(64, 64) == [] and store.unsupported(2, 2) == []


def test_memory_starts_on_a_huge_page_and_moves_blocks_byte_for_byte() -> None:
    from kvloom.cache.arena import Move

    where = memory()
    assert where.bytes.data_ptr() % SLAB_BYTES == 0 and len(where.bytes) == SLAB_BYTES
    content = torch.arange(256, dtype=torch.int32).to(torch.uint8).repeat(17)[: 17 * 128].view(1, -1)
    source, target = np.array([40], np.int32), np.array([3], np.int32)
    where.save(source, content)
    where.copy(Move(17 * 128, source, target))
    assert torch.equal(where.load(target, 17 * 128), content) and torch.equal(where.load(source, 17 * 128), content)
    assert int(where.bytes[: 3 * 128].sum()) == 0
