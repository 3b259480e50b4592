"""Every instruction set in turn, and the same random numbers in every run."""

from collections.abc import Iterator

import pytest
import torch

from kvloom.kernels import cpu

ISAS = cpu.available_isas()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force one instruction set for a test, and put the old one back."""
    before = cpu.isa()
    cpu.force_isa(request.param)
    yield request.param
    cpu.force_isa(before)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Draw the same random numbers in every run."""
    torch.manual_seed(0)
