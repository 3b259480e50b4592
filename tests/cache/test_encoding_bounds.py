"""Every way of writing codes keeps the bound of its formula, and whole blocks get the bits that single slots get."""

import numpy as np
import pytest
import torch

from kvloom.cache.memory import ArenaMemory
from kvloom.cache.stores.cpu import CPUStore
from kvloom.cache.stores.rows import RowStore
from kvloom.kernels import cpu
from kvloom.spec.store import GRANULE_BYTES, NATIVE_STORE, SLAB_BYTES

P, BLOCKS = 16, 2
TINY = torch.finfo(torch.float32).tiny


def inputs(width):
    x = torch.randn(P * BLOCKS, width, generator=torch.Generator().manual_seed(width))
    outlier = x.clone()
    outlier[:, 3] *= 1000
    return {"random": x, "zero": torch.zeros_like(x), "constant": torch.full_like(x, -0.7),
            "an outlier channel": outlier, "subnormal": x * TINY / 8, "near subnormal": x * TINY * 90}  # fmt: skip


def stores(kind, dtype, name):
    """Return a native store and the one called `name` over the same memory."""
    memory = ArenaMemory(SLAB_BYTES, torch.device("cpu"))
    return [kind(each, dtype, memory, P) for each in (NATIVE_STORE[str(dtype).removeprefix("torch.")], name)]


def scales(x, top):
    peak = x.double().abs().amax(1, keepdim=True)
    return torch.where(peak > 0, (peak / top).clamp_min(TINY), 0)


BOUNDS = {
    "int8": lambda x: scales(x, 127) * 0.5001,
    "fp8_e4m3": lambda x: torch.maximum(x.double().abs() / 16, scales(x, 448) / 1024) * 1.0001,
}


def addresses(first, store, k_width, v_width):
    return (first + np.arange(BLOCKS) * (store.block_bytes(k_width, v_width) // GRANULE_BYTES)).astype(np.int32)


def fill(store, where, k, v):
    store.write(np.repeat(where, P), np.tile(np.arange(P), BLOCKS), k.to(store.dtype), v.to(store.dtype))


@pytest.mark.parametrize("store", list(BOUNDS))
@pytest.mark.parametrize("kind", [RowStore, CPUStore])
@pytest.mark.parametrize("name", list(inputs(4)))
def test_a_block_comes_back_within_half_a_step_of_each_token(kind, name, store):
    native, encoded = stores(kind, torch.float32, store)
    k, v = inputs(32)[name], inputs(48)[name]
    source, target = addresses(0, native, 32, 48), addresses(4096, encoded, 32, 48)
    fill(native, source, k, v)
    encoded.encode(native, source, target, 32, 48)
    for got, x in zip(encoded.read(target, 32, 48), (k, v), strict=True):
        assert ((got.flatten(0, 1).double() - x.double()).abs() <= BOUNDS[store](x)).all()


@pytest.mark.parametrize("isa", cpu.available_isas())
@pytest.mark.parametrize("store", list(BOUNDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_blocks_get_the_bits_of_single_slots(isa, dtype, store):
    before = cpu.isa()
    cpu.force_isa(isa)
    try:
        for name in ("random", "an outlier channel", "zero", "subnormal"):
            native, encoded = stores(CPUStore, dtype, store)
            k, v = inputs(48)[name], inputs(80)[name]
            source = addresses(0, native, 48, 80)
            blocks, slots = addresses(4096, encoded, 48, 80), addresses(8192, encoded, 48, 80)
            fill(native, source, k, v)
            encoded.encode(native, source, blocks, 48, 80)
            fill(encoded, slots, k.to(dtype), v.to(dtype))
            size = encoded.block_bytes(48, 80)
            used = encoded.spec.payload_bytes(P, 48, 80)
            one, other = (encoded.memory.load(where, size)[:, :used] for where in (blocks, slots))
            assert torch.equal(one, other)
            assert bool(one[:, P * (48 + 80) :].any()) is bool(k.to(dtype).any()), "scales of zeros are zero"
    finally:
        cpu.force_isa(before)
