"""Solo: the most KV bytes of a request that runs alone, whose steps are therefore known beforehand.

Beside others a prompt gets the tokens that a step has left, so only bounds are known. Alone it gets whole chunks::

    prompt   | chunk | chunk | ... | chunk | rest |     then one token a step

    a step that takes tokens s .. e - 1
    whole lanes     0 ----------------------------------- s ------ e
    windowed lanes            s - (window - 1) ---------- s ------ e      blocks before are freed, those between remain
"""

from kvloom.spec.footprint import request_footprint
from kvloom.spec.kv import KVSpec
from kvloom.spec.policy import PolicySpec
from kvloom.spec.steps import step_bytes


def solo_peak(kv: KVSpec, policy: PolicySpec, prompt: int, output: int, chunk: int) -> int | None:
    """Return the most arena bytes of one request alone in an engine, none of its prompt cached; None if not known.

    The prompt is processed in chunks of `chunk`, and the last of `output` generated tokens is never written.
    """
    written = max(0, output - 1)
    planned = request_footprint(kv, policy, prompt, written, chunk)
    cut = any(term.name == "chunk" for term in policy.triggers)
    if policy.store is None and not cut and planned.replay == 0:
        reading = _growing(kv, 0, prompt, chunk)
        if not policy.evicts:
            return max(reading, _growing(kv, prompt, prompt + written, 1))
        if reading >= max(planned.settled.high, planned.decode.high):
            return reading
    return planned.peak.high if planned.peak.exact else None


def _growing(kv: KVSpec, first: int, last: int, chunk: int) -> int:
    """Return the most bytes while tokens `first .. last - 1` are taken in steps of `chunk`, 0 when there are none.

    Shifting a step by whole blocks adds at least as many blocks at its end as it frees behind a window. The place of
    whole chunks in a block repeats after at most as many steps as a block has tokens. So the last of these steps need
    no less than all before, and only they and the rest are computed.
    """
    steps = -(-(last - first) // chunk)
    starts = (first + step * chunk for step in range(max(0, steps - kv.block_size - 1), steps))
    return max((step_bytes(kv, start, min(last, start + chunk)) for start in starts), default=0)
