"""A GGUF file is read exactly, or refused; damage is detected in the header."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quant
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import CheckpointError, UnsupportedError
from kvloom.models.gguf_file import QUANT_TYPES, GGUFFile

RANDOM = np.random.default_rng(0)


def write(path, tensors, **metadata):
    """Write a GGUF file of {name: (array, quantisation or None)}; `metadata` are strings, numbers or lists."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        add = {int: writer.add_uint32, str: writer.add_string, bool: writer.add_bool, list: writer.add_array}
        add[type(value)](key.replace("__", "."), value)
    for name, (array, quant) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(quant, rows, columns):
    """Return random bytes that are blocks of `quant`, with scales that are ordinary numbers."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[quant]
    if quant in (Quant.F32, Quant.F16):
        return RANDOM.standard_normal((rows, columns)).astype(np.float32 if quant == Quant.F32 else np.float16)
    raw = RANDOM.integers(0, 256, (rows, columns // block, block_bytes), dtype=np.uint8)
    if quant == Quant.BF16:
        raw[..., 1] = 0x3F
    elif quant == Quant.MXFP4:
        raw[..., 0] = RANDOM.integers(110, 140, raw.shape[:-1])  # the scale: a power of two, biased by 127
    else:
        scales = {Quant.Q4_K: (1, 3), Quant.Q5_K: (1, 3), Quant.Q6_K: (209,), Quant.Q4_1: (1, 3), Quant.Q5_1: (1, 3)}
        for high_byte in scales.get(quant, (1,)):
            raw[..., high_byte] = 0x2C
    return raw.reshape(rows, -1)


@pytest.fixture
def small(tmp_path):
    """A file with two tensors and some metadata."""
    matrix = RANDOM.standard_normal((3, 64)).astype(np.float32)
    tensors = {"a.weight": (matrix, None), "b.weight": (gguf.quantize(matrix, Quant.Q8_0), Quant.Q8_0)}
    metadata = {"general__name": "a small one", "x__list": ["é", "b"], "x__numbers": [1, 2, 3], "x__flag": True}
    return write(tmp_path / "small.gguf", tensors, **metadata)


@pytest.mark.parametrize("quant", sorted(QUANT_TYPES), ids=lambda quant: quant.name)
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_every_supported_type_is_decoded_as_the_reference_decodes_it(tmp_path, quant, rows):
    data = stored(quant, rows, 512)
    file = GGUFFile(write(tmp_path / "x.gguf", {"w": (data, quant)}))
    expected = torch.from_numpy(np.array(gguf.dequantize(data, quant)))
    assert file.shapes == {"w": (rows, 512)}
    assert torch.equal(file.read("w", torch.float32), expected)
    assert torch.equal(file.read("w", torch.bfloat16), expected.bfloat16())
    assert np.array_equal(file.read_array("w"), expected.numpy())


def test_a_tensor_larger_than_a_piece_is_put_together_right(tmp_path, monkeypatch):
    monkeypatch.setattr("kvloom.models.gguf_file._CHUNK_ELEMENTS", 96)
    data = stored(Quant.Q4_1, 5, 64)
    file = GGUFFile(write(tmp_path / "x.gguf", {"w": (data, Quant.Q4_1)}))
    assert torch.equal(file.read("w", torch.float32), torch.from_numpy(gguf.dequantize(data, Quant.Q4_1)))


def test_metadata_are_strings_numbers_lists_and_arrays(small):
    metadata = GGUFFile(small).metadata
    assert (metadata["general.name"], metadata["x.flag"], metadata["x.list"]) == ("a small one", True, ["é", "b"])
    assert metadata["x.numbers"].tolist() == [1, 2, 3]


def test_a_type_that_cannot_be_read_is_named_and_does_not_stop_the_file_from_opening(tmp_path):
    data = RANDOM.integers(0, 256, (2, 84), dtype=np.uint8)
    file = GGUFFile(write(tmp_path / "x.gguf", {"w": (data, Quant.Q2_K), "v": (np.ones(3, np.float32), None)}))
    assert dict(file.unreadable) == {"w": "Q2_K"}


def test_a_file_that_ends_too_early_is_a_checkpoint_error_wherever_it_ends(small, tmp_path):
    whole = small.read_bytes()
    data_bytes = 3 * 64 // 32 * 34  # the last tensor; what follows it is padding
    end = GGUFFile(small).header.tensors["b.weight"].offset + data_bytes
    part = tmp_path / "part.gguf"
    for length in {*range(0, end, 13), *range(24), end - 1}:
        part.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            GGUFFile(part)
    part.write_bytes(whole[:end])
    GGUFFile(part)


def test_a_file_that_is_cut_off_after_it_was_opened_is_a_checkpoint_error(small):
    file = GGUFFile(small)
    with small.open("r+b") as cut:
        cut.truncate(file.header.tensors["b.weight"].offset + 5)
    with pytest.raises(CheckpointError, match="cut off"):
        file.read("b.weight", torch.float32)


@given(place=st.integers(0, 420), value=st.integers(0, 255))
def test_a_damaged_byte_gives_an_error_of_ours_or_a_file_within_its_bounds(tmp_path_factory, place, value):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "damaged.gguf"
    if not (folder / "whole.gguf").exists():
        tensors = {"a.weight": (np.ones((2, 32), np.float32), None), "b.weight": (np.ones(4, np.float32), None)}
        write(folder / "whole.gguf", tensors, general__name="x", x__list=["a", "b"], x__numbers=[1, 2])
    data = bytearray((folder / "whole.gguf").read_bytes())
    data[place % len(data)] = value
    path.write_bytes(data)
    try:
        file = GGUFFile(path)
    except (CheckpointError, UnsupportedError):
        return
    for name in file.shapes:
        if name not in file.unreadable:
            assert file.read(name, torch.float32).shape == file.shapes[name]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, b"GGML", "is not a GGUF file"),
        (4, (1).to_bytes(4, "little"), "version 1"),
        (4, (3).to_bytes(4, "big"), "little endian"),
        (16, (1 << 60).to_bytes(8, "little"), "past the end"),
    ],
)
def test_what_is_wrong_with_the_header_is_said(small, place, value, message):
    data = bytearray(small.read_bytes())
    data[place : place + len(value)] = value
    small.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        GGUFFile(small)


def test_a_truncated_tensor_is_named_with_both_sizes(small):
    data = small.read_bytes()
    small.write_bytes(data[: len(data) - 100])
    with pytest.raises(CheckpointError, match=rf"'b\.weight' ends at byte \d+, the file has {len(data) - 100}"):
        GGUFFile(small)


def test_one_part_of_a_split_file_is_refused(tmp_path):
    path = write(tmp_path / "x-00001-of-00002.gguf", {"w": (np.ones(4, np.float32), None)}, split__count=2)
    with pytest.raises(UnsupportedError, match="split"):
        GGUFFile(path)


def test_an_empty_file_and_a_folder_are_checkpoint_errors(tmp_path):
    (tmp_path / "empty.gguf").write_bytes(b"")
    for path in (tmp_path / "empty.gguf", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            GGUFFile(path)
