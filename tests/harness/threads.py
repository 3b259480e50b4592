"""How many threads tests use."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvloom.kernels import cpu


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use `count` threads in torch and in the kernels, and put back what was."""
    before = torch.get_num_threads(), cpu.num_threads()
    torch.set_num_threads(count)
    cpu.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cpu.set_num_threads(before[1])
