"""FP8 e4m3 codes are torch's float8_e4m3fn bit for bit, and kernels multiply exactly their values."""

import numpy as np
import pytest
import torch

from harness.filled_lanes import fill_lanes
from kvloom.cache.memory import ArenaMemory
from kvloom.cache.stores.cpu import CPUStore
from kvloom.cache.stores.rows import RowStore
from kvloom.kernels import cpu
from kvloom.spec.store import SLAB_BYTES

P, WIDTH, MOST = 16, 256, 448.0


def values():
    """Return the 254 finite numbers, by code."""
    codes = torch.arange(256, dtype=torch.uint8)
    found = codes.view(torch.float8_e4m3fn).float()
    return found[found.isfinite()]


def between():
    """Return every number, every midpoint of two, the floats beside both, and smaller ones, with each sign."""
    number = values()[:127]
    middle = (number[1:] + number[:-1]) / 2
    exact = torch.cat([number, middle, torch.tensor([2.0**-11, 2.0**-60, 1e-40])])
    up, down = (torch.nextafter(exact, torch.tensor(to)) for to in (torch.inf, -torch.inf))
    all_of = torch.cat([exact, up, down])
    return torch.cat([all_of, -all_of]).clamp(-MOST, MOST)


def rows(x):
    """Return x in rows of WIDTH whose largest element is MOST, so that their scale is 1; a multiple of P rows."""
    per = WIDTH - 1
    number = -(-len(x) // (per * P)) * P
    padded = torch.zeros(number * per)
    padded[: len(x)] = x
    return torch.cat([padded.view(number, per), torch.full((number, 1), MOST)], 1)


@pytest.fixture(params=cpu.available_isas())
def isa(request):
    before = cpu.isa()
    cpu.force_isa(request.param)
    yield request.param
    cpu.force_isa(before)


@pytest.mark.parametrize("whole", [False, True])
def test_codes_are_those_of_torch_at_and_between_all_numbers(isa, whole):
    x = rows(between())
    memory = ArenaMemory(SLAB_BYTES, torch.device("cpu"))
    native, store = (CPUStore(name, torch.float32, memory, P) for name in ("fp32", "fp8_e4m3"))
    blocks = len(x) // P
    first, second = (np.arange(blocks, dtype=np.int32) * (2 * P * WIDTH * 4 // 128) + at for at in (0, 8192))
    (native if whole else store).write(np.repeat(first, P), np.tile(np.arange(P), blocks), x, x)
    if whole:
        store.encode(native, first, second, WIDTH, WIDTH)
    want = x.to(torch.float8_e4m3fn).float().view(torch.int32)
    for side in store.read(second if whole else first, WIDTH, WIDTH):
        assert torch.equal(side.flatten(0, 1).view(torch.int32), want), "the sign of zero included"


def test_kernels_and_torch_encode_to_the_same_bits(isa):
    x = torch.randn(P, WIDTH, generator=torch.Generator().manual_seed(1)) * torch.logspace(-44, 37, P)[:, None]
    x[3] = 0
    found = []
    for kind in (CPUStore, RowStore):
        store = kind("fp8_e4m3", torch.float32, ArenaMemory(SLAB_BYTES, torch.device("cpu")), P)
        at = np.zeros(P, np.int32)
        store.write(at, np.arange(P), x, x.flip(1))
        found.append(torch.stack(store.read(at[:1], WIDTH, WIDTH)))
    assert torch.equal(*(each.view(torch.int32) for each in found)) and found[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_one_token_returns_each_value_exactly(isa, dtype):
    places = [1, 2, 3, 4]  # the newest of so many tokens, alone in its window: each place in a word of four codes
    filled = fill_lanes("fp8_e4m3", 1, 1, WIDTH, places, window=1)
    row = torch.zeros(1, WIDTH)
    row[0, : len(values())] = values()
    for b, n in enumerate(places):
        block, slot = filled.table[b, 2, :1], np.array([n - 1])
        cpu.write_slots(filled.arena, "fp8_e4m3", P, block, slot, torch.zeros_like(row), row)
    q = torch.randn(len(places), 1, WIDTH).to(dtype)
    out = cpu.attention(filled.lanes, filled.shape, np.arange(5, dtype=np.int32), filled.rows, q, 0.2)
    assert torch.equal(out[:, 0].float(), row.expand(len(places), -1))
