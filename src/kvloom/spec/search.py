"""Search for how much fits, where more of it never fits better."""

from collections.abc import Callable


def largest(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """Return the largest number from `least`, at least 1, to `most` for which `fits`; None when `least` does not.

    What fits must be all numbers up to some number. Doubles, then halves: about 2 log2(result / least) questions.
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
