"""Windows: prompts cut from texts, each with the tokens that follow it in the text. Torch-free."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from kvloom.errors import InvalidInputError


@dataclass(frozen=True)
class Window:
    """A prompt and the text's own next tokens, as token ids."""

    prompt: tuple[int, ...]
    follow: tuple[int, ...]


def windows_of(
    texts: Sequence[Sequence[int]], prompt: int, follow: int, count: int, first: Sequence[int] = ()
) -> list[Window]:
    """Return `count` windows that do not overlap, taken from the token ids of `texts` in turn, or as many as there are.

    Each text is cut into slots, which come in an order that depends on their number alone, so that a greater count
    only adds windows::

        text   | slot 0: prompt, follow | slot 1: prompt, follow | ... | rest |
        window |           2            |           0            |

    A prompt begins with the tokens `first` (BOS), which count among its `prompt` tokens. Raises `InvalidInputError`
    when no text holds a whole window.
    """
    body = prompt - len(first)
    if body < 1 or follow < 2 or count < 1:
        raise InvalidInputError(
            f"{count} windows of {prompt} prompt tokens and {follow} that follow; it takes at least one window, "
            f"a prompt of at least {1 + len(first)} and 2 tokens that follow"
        )
    orders = []
    for text in texts:
        slots = list(range(len(text) // (body + follow)))
        random.Random(0).shuffle(slots)
        orders.append(slots)
    if not any(orders):
        longest = max((len(text) for text in texts), default=0)
        raise InvalidInputError(
            f"the text has {longest} tokens and one window takes {body + follow}; give a longer --text or a shorter "
            "--context"
        )
    found: list[Window] = []
    for turn in range(max(map(len, orders))):
        for text, slots in zip(texts, orders, strict=True):
            if turn < len(slots) and len(found) < count:
                at = slots[turn] * (body + follow)
                end = at + body
                found.append(Window((*first, *text[at:end]), tuple(text[end : end + follow])))
    return found
