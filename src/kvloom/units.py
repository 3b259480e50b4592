"""Byte and count units: GiB is 2**30 and GB is 10**9, and every figure names its unit."""

import re
from fractions import Fraction

from kvloom.errors import InvalidInputError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_BYTE_UNITS = {
    "": 1, "b": 1,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1 << 40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
}  # fmt: skip


def format_bytes(num_bytes: int) -> str:
    """Return e.g. `11.3 GiB`, `512 B`; binary units, three significant digits."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


def parse_bytes(text: str | int) -> int:
    """Return the bytes that `text` names (`2GiB`, `1.5GB`, `512m`, `4096`), rounded down where a unit is divided.

    Raises `InvalidInputError` for anything else, including a fraction of a byte without a unit.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _BYTE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or (unit == 1 and "." in match[1]):
        raise InvalidInputError(f"{text!r} is not a size; write bytes or e.g. 512MiB, 2GiB, 1.5GB")
    return int(Fraction(match[1]) * unit)


def parse_count(text: str | int) -> int:
    """Return the tokens that `text` names: `4096`, `1k` = 1000, `1K` = 1024, `2M` = 2 * 1024**2.

    Raises `InvalidInputError` for anything else; a fraction of a token is refused, not truncated.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)([kKmM]?)\s*", text)
    if not match:
        raise InvalidInputError(f"{text!r} is not a count; write e.g. 4096, 4k (4000) or 4K (4096)")
    scale = {"": 1, "k": 1000, "K": 1024, "m": 10**6, "M": 1 << 20}[match[2]]
    value = Fraction(match[1]) * scale
    if value.denominator != 1:
        raise InvalidInputError(f"{text!r} is {float(value):g}; a count is a whole number")
    return value.numerator
