"""Segments: which store holds which columns of a lane, always in order and always open in 16 bit at the end."""

import pytest

from kvloom.cache.segments import NATIVE, Segment, SegmentList
from kvloom.spec.kv import KVSpec, LayerKV

SPEC = KVSpec((LayerKV(2, 64, 64), LayerKV(1, 128, 128)), 16, "bf16")


@pytest.fixture
def segments() -> SegmentList:
    return SegmentList(max_sequences=2, num_lanes=3)


def test_a_lane_is_native_and_open_from_the_start(segments: SegmentList) -> None:
    assert segments.of(0, 1) == [Segment(NATIVE, 0, None)]
    assert segments.is_native(0, 1) and not segments.any_encoded(0)


def test_sinks_and_the_end_stay_native_around_encoded_blocks(segments: SegmentList) -> None:
    segments.encode(0, 1, "int8", 2, 5)
    assert segments.of(0, 1) == [Segment(NATIVE, 0, 2), Segment("int8", 2, 5), Segment(NATIVE, 5, None)]
    assert not segments.is_native(0, 1) and segments.is_native(0, 0) and segments.is_native(1, 1)


def test_neighbouring_runs_of_one_store_become_one_segment(segments: SegmentList) -> None:
    segments.encode(0, 0, "int8", 4, 6)
    segments.encode(0, 0, "int8", 1, 2)
    segments.encode(0, 0, "int8", 2, 4)
    assert segments.of(0, 0) == [Segment(NATIVE, 0, 1), Segment("int8", 1, 6), Segment(NATIVE, 6, None)]


def test_different_stores_stay_apart(segments: SegmentList) -> None:
    segments.encode(0, 0, "int4", 0, 2)
    segments.encode(0, 0, "int8", 2, 3)
    assert segments.of(0, 0) == [Segment("int4", 0, 2), Segment("int8", 2, 3), Segment(NATIVE, 3, None)]


def test_a_block_that_is_encoded_twice_is_caught(segments: SegmentList) -> None:
    segments.encode(0, 0, "int8", 1, 4)
    with pytest.raises(AssertionError, match="must not overlap"):
        segments.encode(0, 0, "int4", 3, 5)


def test_a_copy_is_independent_of_its_source(segments: SegmentList) -> None:
    segments.encode(0, 0, "int8", 0, 1)
    segments.copy(0, 1)
    segments.encode(1, 0, "int8", 1, 2)
    assert segments.of(0, 0)[0] == Segment("int8", 0, 1)
    assert segments.of(1, 0)[0] == Segment("int8", 0, 2)
    segments.clear(1)
    assert not segments.any_encoded(1) and segments.any_encoded(0)


def test_what_encoding_saves_is_counted_to_the_byte(segments: SegmentList) -> None:
    """A block of lane 0: 16 x 128 x 2 = 4096 bytes, in int8 16 x 128 + 2 x 16 x 4 = 2176. Lane 2: 8192 and 4224."""
    segments.encode(0, 0, "int8", 0, 3)
    assert segments.extra_bytes(0, SPEC) == 3 * (2176 - 4096)
    segments.encode(0, 2, "int8", 1, 2)
    assert segments.extra_bytes(0, SPEC) == 3 * (2176 - 4096) + (4224 - 8192)


def test_arrays_name_every_segment_but_the_open_ends(segments: SegmentList) -> None:
    start, store, last = segments.arrays()
    assert (start.tolist(), store.tolist(), last.tolist()) == ([0] * 7, [], [])
    segments.encode(1, 0, "int8", 2, 5)
    segments.encode(0, 2, "int4", 0, 2)
    segments.encode(0, 2, "int8", 2, 3)
    start, store, last = segments.arrays()
    assert segments.store_names == [NATIVE, "int8", "int4"]
    assert start.tolist() == [0, 0, 0, 2, 4, 4, 4]  # lanes 0, 1, 2 of sequence 0, then of sequence 1
    assert store.tolist() == [2, 1, 0, 1] and last.tolist() == [2, 3, 2, 5]


def test_arrays_follow_every_change_and_the_version_tells(segments: SegmentList) -> None:
    versions = [segments.version]
    for change in (
        lambda: segments.encode(0, 1, "int8", 0, 1),
        lambda: segments.copy(0, 1),
        lambda: segments.encode(1, 1, "int8", 1, 4),
        lambda: segments.clear(0),
    ):
        change()
        versions.append(segments.version)
        flat = [(s, lane) for s in range(2) for lane in range(3)]
        start, store, last = segments.arrays()
        for (sequence, lane), low, high in zip(flat, start.tolist(), start.tolist()[1:], strict=False):
            closed = segments.of(sequence, lane)[:-1]
            assert [segments.store_names[i] for i in store[low:high]] == [segment.store for segment in closed]
            assert last[low:high].tolist() == [segment.last for segment in closed]
    assert len(set(versions)) == len(versions)
    segments.clear(0)  # nothing was there
    segments.copy(0, 0)
    assert segments.version == versions[-1]
