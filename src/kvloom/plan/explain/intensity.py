"""Arithmetic intensity of decode, and the batch from which it is bound by arithmetic."""

from kvloom.plan.explain.explanation import Explanation, attending
from kvloom.plan.figure import Figure
from kvloom.plan.question import Question
from kvloom.plan.roofline import Roofline

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def intensity(asked: Question) -> Explanation:
    """Return operations per byte of a decode step over the batch, beside the operations per byte of the device."""
    mixers = attending(asked, "intensity")
    roof = Roofline(asked)
    ridge, turn = roof.rates.ridge, roof.compute_bound_batch
    rows = []
    for batch in BATCHES:
        weights = roof.reads.weight_bytes(batch)
        kv = batch * roof.reads.kv_read_bytes(asked.prompt, max(0, asked.output - 1))
        time = roof.tpot(batch).value
        bound = "-" if ridge is None else "bandwidth" if roof.intensity(batch) < ridge else "arithmetic"
        rows.append((str(batch), f"{roof.intensity(batch):.1f}", f"{kv / (kv + weights):.0%}", bound,
                     "-" if time is None else f"{batch / time:,.0f}"))
    groups = {mixer.num_heads / getattr(mixer, "num_kv_heads", 1) for mixer in mixers}
    shared = ", ".join(f"{group:g}" for group in sorted(groups))
    lines = [
        "A decode step reads all weights once for the whole batch, but each request's own K and V: weights become "
        "cheaper "
        "with the batch, attention does not.",
        "Attention alone does about one operation per byte for every query head that shares a 16-bit K/V head: "
        f"{shared} "
        "here.",
    ]
    figures = {"intensity": Figure(roof.intensity(asked.users), "FLOP/byte", "exact", f"batch {asked.users}")}
    if ridge is None:
        lines.append("The speed of this device is not known, so the batch from which arithmetic is the limit is not.")
    else:
        figures["ridge"] = Figure(
            ridge, "FLOP/byte", roof.rates.speed_label, f"peak over bandwidth of {asked.device.name}"
        )
        lines.append(f"{asked.device.name} does {ridge:.0f} operations in the time of one byte.")
        if roof.rates.peak_stands_in:
            lines.append(f"Its peak for 8-bit activations is not known; that of {asked.dtype} is used.")
        if turn is None:
            lines.append(f"At {asked.context} tokens no batch is bound by arithmetic: reading K and V keeps decode "
                         "bound by "
                         "memory.")
        else:
            lines.append(f"At {asked.context} tokens decode is bound by arithmetic from a batch of {turn} on.")
            figures["compute_bound_batch"] = Figure(turn, "requests", roof.rates.speed_label)
    where = roof.kv_bound_context
    if where is not None:
        lines.append(f"With {asked.users} users a step reads more K and V than weights from {where:,} tokens of "
                     "context on.")
        figures["kv_bound_context"] = Figure(where, "tokens", "exact", f"{asked.users} users")
    return Explanation("intensity", f"Operations per byte of decode ({asked.model.name})", tuple(lines),
                       ("batch", "FLOP/byte", "KV share", "bound by", "tokens/s at best"), tuple(rows), figures)
