"""Headers of safetensors files: names, types, shapes and bytes; the tensors themselves are never read. Torch-free."""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from kvloom.errors import CheckpointError

INDEX = "model.safetensors.index.json"
"""Index that maps tensors to files, where there are several."""

MAX_HEADER_BYTES = 100 << 20
"""Longest header that is read; the format allows 100 MB."""

_AGAIN = "delete it and fetch it again"
_DTYPES = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I64": 64, "I32": 32,
    "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F8_E4M3": "float8_e4m3fn"}


@dataclass(frozen=True)
class WeightFiles:
    """Totals of the headers: bytes of all tensors, their number of elements, and the dtype of most bytes."""

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
                raise CheckpointError(f"{path} is truncated or damaged: it has {len(prefix)} bytes; {_AGAIN}")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(MAX_HEADER_BYTES, size - 8):
                what = f"claims a header of {length} bytes in a file of {size}"
                raise CheckpointError(f"{path} is truncated or damaged: it {what}; {_AGAIN}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: its header is not JSON; {_AGAIN}") from error
    found: dict[str, tuple[str, tuple[int, ...], int]] = {}
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            bits = prod(shape) * _DTYPES[dtype]
            if end - start != -(-bits // 8) or not 0 <= start <= end <= size - 8 - length:
                what = f"tensor {name} lies from byte {start} to {end}, for {bits} bits"
                raise CheckpointError(f"{path} is truncated or damaged: {what}; {_AGAIN}")
            found[name] = (dtype, shape, end - start)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: its header is not understood ({error!r})") from error
    return found


def weight_map(folder: Path) -> dict[str, str] | None:
    """Return the file of each tensor by the index in `folder`; None where there is no index.

    Raises `CheckpointError` for an index that is damaged or names files outside its folder or that are missing.
    """
    index = folder / INDEX
    if not index.is_file():
        return None
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(shard) for name, shard in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files: {error}") from error
    shards = sorted(set(names.values()))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise CheckpointError(f"{index} names files outside its folder: {', '.join(outside)}")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which its index names; fetch the model again")
    return names


def read_weight_files(folder: Path) -> WeightFiles | None:
    """Return the weights of all safetensors files in `folder`, None when it has none.

    An index names the files that belong to the model (`weight_map`).
    """
    indexed = weight_map(folder)
    names = sorted(set(indexed.values())) if indexed is not None else None
    paths = sorted(folder.glob("*.safetensors")) if names is None else [folder / name for name in names]
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
