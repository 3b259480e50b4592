"""Contiguous preallocation against blocks."""

from kvloom.errors import InvalidInputError
from kvloom.plan.explain.explanation import Explanation, count
from kvloom.plan.figure import Figure
from kvloom.plan.memory import Memory
from kvloom.plan.question import Question
from kvloom.units import format_bytes


def preallocation(asked: Question) -> Explanation:
    """Compare the KV that a request uses with its reservation, contiguous for the longest request or in blocks.

    A contiguous cache must reserve the longest possible request; blocks waste at most `block_size - 1` tokens in each
    lane.
    """
    kv = asked.whole_kv
    if kv is None:
        raise InvalidInputError(f"{asked.model.name} has no keys and values, so 'preallocation' does not apply to it")
    longest = max(asked.context, asked.model.max_position or asked.context)
    tiny = asked.model.kv_spec(1, asked.native_store)

    def used(tokens: int) -> int:
        return tiny.request_bytes(tokens)

    reserved = used(longest)
    rows = []
    for share in (1, 4, 16, 64):
        tokens = max(1, longest // share)
        paged = kv.request_bytes(tokens)
        empty, partly = 1 - used(tokens) / reserved, 1 - used(tokens) / paged
        rows.append((count(tokens), format_bytes(used(tokens)), format_bytes(reserved), f"{empty:.1%}",
                     format_bytes(paged), f"{partly:.2%}"))
    room = Memory(asked).kv_room
    paged = kv.request_bytes(asked.context)
    lines = [
        f"A cache in one piece must be reserved for the longest request, {count(longest)} tokens: "
        f"{format_bytes(reserved)}. "
        f"A request of {asked.context} tokens uses {format_bytes(used(asked.context))} of it; "
        f"{1 - used(asked.context) / reserved:.1%} is unused.",
        f"In blocks of {asked.block_size} tokens the same request takes {format_bytes(paged)}: only the last block "
        "of each "
        f"of its {kv.num_lanes} lanes can be partly empty, at most {asked.block_size - 1} tokens.",
    ]
    figures = {
        "reserved": Figure(reserved, "bytes", "exact", f"for {longest} tokens"),
        "paged": Figure(paged, "bytes", "exact", f"for {asked.context} tokens"),
        "used": Figure(used(asked.context), "bytes", "exact"),
    }
    if room is not None and room > 0 and asked.devices == 1:
        pieces, blocks = room // reserved, room // paged
        lines.append(f"On {asked.device.name} there is room for {pieces} such requests in pieces, {blocks} in blocks.")
        figures["requests_contiguous"] = Figure(pieces, "requests", "assumed", "memory left after weights and overhead")
        figures["requests_paged"] = Figure(blocks, "requests", "assumed", "memory left after weights and overhead")
    return Explanation("preallocation", f"Reserving in one piece or in blocks ({asked.model.name})", tuple(lines),
                       ("tokens", "used", "reserved", "waste", "in blocks", "waste"), tuple(rows), figures)
