"""Memory of the arena: what `populate` makes, and that it changes nothing."""

import mmap
from pathlib import Path

import pytest
import torch

from kvloom.cache.memory import ArenaMemory

MANY = 32 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_populated_pages_are_there_and_contents_stay() -> None:
    memory = ArenaMemory(2 * MANY, torch.device("cpu"))
    memory.bytes[5] = 7
    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not say what is resident")
    before = resident_bytes()
    memory.populate(MANY)
    grown = resident_bytes() - before
    assert grown in range(MANY - (4 << 20), MANY + (8 << 20)) or grown < 1 << 20  # the latter: Linux before 5.14
    assert memory.bytes[5] == 7 and int(memory.bytes.sum()) == 7


def test_more_than_all_is_all() -> None:
    memory = ArenaMemory(1 << 21, torch.device("cpu"))
    memory.populate(1 << 40)
    assert not memory.bytes.any()


def test_systems_without_huge_pages_make_none(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = ArenaMemory(MANY, torch.device("cpu"))
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    before = resident_bytes()
    memory.populate(MANY)
    assert resident_bytes() - before < 4 << 20
