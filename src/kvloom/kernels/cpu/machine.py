"""Facts about this processor for the kernels: instruction set, measured bandwidth and peak."""

import torch

import kvloom.kernels.cpu._ext as _ext
from kvloom.errors import UnsupportedError
from kvloom.kernels.cpu.elements import contiguous
from kvloom.kernels.cpu.threads import follow_torch

PRODUCT_CODE = {"fp32": 0, "bf16": 1, "int8": 4}


def isa() -> str:
    """Return the instruction set in use: "avx512bf16", "avx512", "avx2" or "portable"."""
    return _ext.isa()


def available_isas() -> list[str]:
    """Return the instruction sets that this processor can run, best first; `KVLOOM_CPU_ISA` overrides the choice."""
    return _ext.available_isas()


def force_isa(name: str) -> None:
    """Use `name` from now on in the whole process; raises UnsupportedError if this processor lacks it."""
    if not _ext.force_isa(name):
        raise UnsupportedError(f"instruction set {name!r}", [f"this processor offers {', '.join(available_isas())}"])


def read_bandwidth(memory: torch.Tensor) -> float:
    """Return bytes per second at which all threads together read contiguous `memory` once."""
    contiguous(memory, "memory")
    follow_torch()
    return _ext.read_bandwidth(memory.data_ptr(), memory.numel() * memory.element_size())


def peak_flops(product: str, iterations: int = 20000) -> float:
    """Return operations per second of register-tile products from the first-level cache: "fp32", "bf16" or "int8"."""
    follow_torch()
    return _ext.peak_flops(PRODUCT_CODE[product], iterations)
