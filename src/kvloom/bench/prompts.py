"""Prompts for a load: random token ids of given lengths, or lines of a file."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvloom.errors import InvalidInputError


@dataclass(frozen=True)
class LoadPrompt:
    """A prompt, as text or token ids, and how many tokens to ask for."""

    prompt: str | Sequence[int]
    max_tokens: int


def random_prompts(
    count: int, *, input_len: int, output_len: int, range_ratio: float, prefix_len: int, vocab_size: int, seed: int
) -> list[LoadPrompt]:
    """Return `count` prompts of random token ids.

    Lengths are uniform in length * (1 - range_ratio) .. length * (1 + range_ratio); the first `prefix_len` tokens,
    beside `input_len`, are the same in all.
    """
    if not 0 <= range_ratio < 1:
        raise InvalidInputError(f"the range ratio is {range_ratio}; it must be from 0 to below 1")
    rng = random.Random(seed)
    prefix = [rng.randrange(vocab_size) for _ in range(prefix_len)]

    def length(mean: int) -> int:
        return max(1, rng.randint(round(mean * (1 - range_ratio)), round(mean * (1 + range_ratio))))

    return [
        LoadPrompt(prefix + [rng.randrange(vocab_size) for _ in range(length(input_len))], length(output_len))
        for _ in range(count)
    ]


def custom_prompts(path: Path, count: int, *, output_len: int, seed: int) -> list[LoadPrompt]:
    """Return `count` prompts from a file of JSON lines, {"prompt": ..., "max_tokens": optional}, shuffled, repeated.

    Raises `InvalidInputError` naming the line at fault.
    """
    found: list[LoadPrompt] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"cannot read the prompts in {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            found.append(LoadPrompt(entry["prompt"], int(entry.get("max_tokens", output_len))))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InvalidInputError(f'{path}:{number} is not JSON like {{"prompt": "..."}}') from None
    if not found:
        raise InvalidInputError(f"{path} has no prompts")
    random.Random(seed).shuffle(found)
    return [found[index % len(found)] for index in range(count)]
