"""Layouts of K and V in memory: heads first, tokens first, or in blocks."""

from kvloom.errors import InvalidInputError
from kvloom.plan.explain.explanation import Explanation, attending, count
from kvloom.plan.figure import Figure
from kvloom.plan.question import Question
from kvloom.spec.format import store_format
from kvloom.units import format_bytes


def layouts(asked: Question) -> Explanation:
    """Compare how far apart neighbouring tokens of one head lie, and what must be contiguous, in three layouts.

    `G` heads, `S` reserved tokens, `D` numbers a head, `P` tokens a block.
    """
    attending(asked, "layouts")
    kv = asked.whole_kv
    if kv is None:
        raise InvalidInputError(f"{asked.model.name} has no keys and values, so 'layouts' does not apply to it")
    layer = kv.layers[0]
    heads, length = layer.num_lanes, asked.context
    row = store_format(kv.store).payload_bytes(1, layer.k_width, 0)
    block = kv.layer_block_bytes(0)
    rows = (
        ("heads first [G, S, D]", format_bytes(row), format_bytes(length * row), format_bytes(heads * length * row),
         "nothing: the row of a head is one piece"),
        ("tokens first [S, G, D]", format_bytes(heads * row), format_bytes(row), format_bytes(heads * length * row),
         "nothing: heads share each token's row"),
        ("blocks of one head [N, P, D]", format_bytes(row), format_bytes(asked.block_size * row), format_bytes(block),
         f"a block, after {asked.block_size} tokens"),
    )
    return Explanation(
        "layouts",
        f"Keys of one layer in memory: {heads} heads, {count(length)} tokens, {layer.k_width} numbers "
        f"({asked.model.name})",
        (
            "Heads first: decode reads each head's keys in one run; a new token writes to G far places, and the "
            "length must "
            "be reserved.",
            f"Tokens first: a new token is one write of {format_bytes(heads * row)}; reading one head skips over "
            "the others.",
            f"Blocks of one head: runs of {asked.block_size} tokens that lie anywhere. A head that drops tokens "
            "gives blocks "
            f"back ({format_bytes(block)} each, K and V) and the other heads are unchanged, and a prefix is shared by "
            "pointing to "
            "its blocks.",
        ),
        ("layout", "next token of a head", "in one run", "allocated at once", "freed when one head drops tokens"),
        rows,
        {
            "key_bytes": Figure(row, "bytes", "exact", "one token, one head"),
            "block_bytes": Figure(block, "bytes", "exact", "K and V of one block of one head"),
        },
    )
