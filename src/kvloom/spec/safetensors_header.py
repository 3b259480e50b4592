"""Weight bytes from the headers of safetensors files; the tensors themselves are never read."""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from kvloom.errors import CheckpointError

MAX_HEADER_BYTES = 100 << 20
"""Longest header that is read; the format allows 100 MB."""

_DTYPES = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I64": 64, "I32": 32,
    "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F8_E4M3": "float8_e4m3fn"}


@dataclass(frozen=True)
class WeightFiles:
    """What the headers say: bytes of all tensors, their number of elements, and the dtype of most bytes."""

    num_bytes: int
    num_elements: int
    dtype: str | None


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Return name -> (dtype, shape, bytes) of the tensors in one file; raises `CheckpointError` when it is damaged."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path} is too short for a safetensors file")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path} claims a header of {length} bytes in a file of {size}; it is damaged")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"the header of {path} is not JSON; the file is damaged") from error
    found: dict[str, tuple[str, tuple[int, ...], int]] = {}
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            bits = prod(shape) * _DTYPES[dtype]
            if end - start != -(-bits // 8) or not 0 <= start <= end <= size - 8 - length:
                raise CheckpointError(f"tensor {name} of {path} has {end - start} bytes; the file is damaged")
            found[name] = (dtype, shape, end - start)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the header of {path} is not understood ({error!r})") from error
    return found


def read_weight_files(folder: Path) -> WeightFiles | None:
    """Return the weights of all safetensors files in `folder`, None when it has none.

    An index names the files that belong to the model; one that is missing is a `CheckpointError`.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is not understood ({error!r})") from error
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which its index names; fetch them first")
        paths = [folder / name for name in names]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        return None
    num_bytes = num_elements = 0
    by_dtype: dict[str, int] = {}
    for path in paths:
        for dtype, shape, size in read_header(path).values():
            num_bytes += size
            num_elements += prod(shape)
            by_dtype[dtype] = by_dtype.get(dtype, 0) + size
    most = max(by_dtype, key=lambda name: by_dtype[name], default="")
    return WeightFiles(num_bytes, num_elements, _NAMES.get(most))
