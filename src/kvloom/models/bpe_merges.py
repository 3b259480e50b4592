"""Merge rules of a byte-pair vocabulary whose file lists only the tokens."""

from collections.abc import Callable, Mapping


def merges_of_vocab(
    vocab: Mapping[str, int], mergeable: Callable[[int], bool], rank: Callable[[int], float]
) -> list[tuple[str, str]]:
    """Return every (left, right) whose concatenation is a token, in the order in which they apply.

    `vocab` maps tokens to ids. Only results for which `mergeable(id)` holds are built; lower `rank(id)` comes first,
    then the longer left part, then the longer right part. This recovers the rules of a sentencepiece vocabulary, which
    ranks tokens (Kudo and Richardson 2018), for tokenizers that rank merges.
    """
    found: list[tuple[float, int, int, int, str, str]] = []
    for token, index in vocab.items():
        if len(token) < 2 or not mergeable(index):
            continue
        order = rank(index)
        for cut in range(1, len(token)):
            left = token[:cut]
            if left in vocab:
                right = token[cut:]
                if right in vocab:
                    found.append((order, -cut, -len(right), index, left, right))
    found.sort(key=lambda rule: rule[:4])
    return [(left, right) for *_, left, right in found]
