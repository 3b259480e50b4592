"""Division of a budget in tokens into whole numbers that sum exactly to the budget."""

from collections.abc import Sequence
from fractions import Fraction

from kvloom.errors import InvalidInputError


def divide_exactly(shares: Sequence[Fraction], total: int) -> list[int]:
    """Return whole numbers near `shares` that sum to `total`: floors, then the largest remainders get one more.

    Ties go to the earlier share. Raises `InvalidInputError` when the shares do not sum to `total`.
    """
    if sum(shares) != total:
        raise InvalidInputError(f"shares sum to {sum(shares)}, not to {total}")
    floors = [share.numerator // share.denominator for share in shares]
    order = sorted(range(len(shares)), key=lambda i: (floors[i] - shares[i], i))
    for index in order[: total - sum(floors)]:
        floors[index] += 1
    return floors


def pyramid_budgets(budget: int, window: int, num_layers: int, prompt: int, beta: float) -> list[int]:
    """Return tokens kept per lane in each of `num_layers` layers, early layers most; they sum to layers x budget.

    Every layer keeps `window` tokens of the budget; the rest falls linearly from the first layer to the last, which
    gets 1/beta of the average. No layer keeps more than the prompt: the surplus of the first layers then goes to the
    last. A prompt below 2 (budget - window), which the first layer would keep almost whole, is divided evenly.
    Source: PyramidKV, arXiv 2406.02069, section 3.2; both rules for short prompts are those of its code.
    """
    if prompt <= budget:
        return [prompt] * num_layers
    shared = max(0, budget - window)
    if num_layers == 1 or prompt < 2 * shared:
        return [budget] * num_layers
    last = Fraction(shared) / Fraction(str(beta))
    first = 2 * shared - last
    room = prompt - (budget - shared)
    if first > room:
        first = Fraction(room)
        last = 2 * shared - first
    step = (first - last) / (num_layers - 1)
    parts = divide_exactly([first - index * step for index in range(num_layers)], num_layers * shared)
    return [part + budget - shared for part in parts]
