"""The memory behind an arena: pages that are committed before they are needed."""

import sys
from pathlib import Path

import pytest
import torch

from kvloom.cache.memory import ArenaMemory
from kvloom.spec.store import SLAB_BYTES

linux = pytest.mark.skipif(sys.platform != "linux", reason="pages are committed ahead on Linux only")


def resident_bytes(memory: ArenaMemory) -> int:
    """Bytes of the pages in memory of the mapping that `memory` lies in."""
    address = memory.bytes.data_ptr()
    inside, resident = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(x, 16) for x in head.split("-"))
            inside = first <= address < last
        elif inside and head == "Rss:":
            resident += int(line.split()[1]) << 10
    return resident


@linux
def test_committed_pages_are_there_and_no_others_and_hold_what_was_written() -> None:
    memory = ArenaMemory(8 * SLAB_BYTES, torch.device("cpu"))
    memory.bytes[5] = 7
    before = resident_bytes(memory)
    thread = memory.commit(3 * SLAB_BYTES - 1)
    assert thread is not None
    thread.join()
    if resident_bytes(memory) == before:
        pytest.skip("this system is older than the advice")
    assert 3 * SLAB_BYTES <= resident_bytes(memory) < 5 * SLAB_BYTES
    assert memory.bytes[5] == 7 and int(memory.bytes.sum(dtype=torch.int64)) == 7


@linux
def test_more_than_there_is_commits_all_there_is() -> None:
    memory = ArenaMemory(2 * SLAB_BYTES, torch.device("cpu"))
    thread = memory.commit(1 << 40)
    assert thread is not None
    thread.join()
    assert int(memory.bytes.sum(dtype=torch.int64)) == 0
