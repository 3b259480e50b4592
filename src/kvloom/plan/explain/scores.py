"""The size of the n x n score matrix, which kernels never store as a whole."""

from kvloom.plan.explain.explanation import Explanation, attending, count
from kvloom.plan.figure import Figure
from kvloom.plan.question import Question
from kvloom.units import format_bytes

TILE = 128
"""Keys that are scored at a time, in the example of a tiled kernel."""


def scores(asked: Question) -> Explanation:
    """Size the score matrix of a prompt, whole and in tiles.

    A softmax over tiles keeps a running maximum and sum per query, so that only a tile of scores exists at a time.
    """
    mixers = attending(asked, "scores")
    heads, prompt = max(mixer.num_heads for mixer in mixers), asked.prompt
    one, layer = prompt * prompt * 4, heads * prompt * prompt * 4
    rows = []
    for share in (1, 4, 16):
        tokens = max(1, prompt // share)
        rows.append((count(tokens), format_bytes(tokens * tokens * 4), format_bytes(heads * tokens * tokens * 4)))
    chunk = min(asked.chunk, prompt)
    tile = heads * chunk * TILE * 4
    return Explanation(
        "scores",
        f"The score matrix of {prompt} tokens ({asked.model.name})",
        (
            f"Every query is compared with every key before it: {count(prompt)} x {count(prompt)} scores a head. In "
            "float32 "
            f"that is {format_bytes(one)} for one head and {format_bytes(layer)} for the {heads} heads of one layer.",
            "It is never built. Keys are taken in tiles; each query keeps a running maximum, a running sum and its "
            "output. "
            f"With {chunk} queries and {TILE} keys at a time, {format_bytes(tile)} of scores exist at most.",
            "Generating one token needs one row of it only, as long as the context.",
        ),
        ("tokens", "one head", f"{heads} heads of a layer"),
        tuple(rows),
        {
            "score_matrix_head": Figure(one, "bytes", "exact", "float32"),
            "score_matrix_layer": Figure(layer, "bytes", "exact", "float32"),
            "score_tile": Figure(tile, "bytes", "assumed", f"{chunk} queries x {TILE} keys, all heads"),
        },
    )
