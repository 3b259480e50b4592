"""Settings for the tests of the engine."""

from collections.abc import Iterator

import pytest
import torch

from kvloom.kernels import cpu


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Small tensors: more than one thread only costs time."""
    before = torch.get_num_threads(), cpu.num_threads()
    torch.set_num_threads(1)
    cpu.set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    cpu.set_num_threads(before[1])
