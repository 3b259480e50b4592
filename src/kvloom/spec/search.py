"""Search for the largest number that fits, where every smaller number fits too."""

from collections.abc import Callable


def largest(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """Return the largest number from `least`, at least 1, to `most` for which `fits`; None when `least` does not.

    `fits` must be true up to some number and false above. Doubles, then halves: about 2 log2(result / least) calls.
    """
    if least > most or not fits(least):
        return None
    low, high = least, least * 2
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
