"""KV bytes of a request under a policy: exact where lengths are known beforehand, else bounds.

Planner, admission and scheduler all compute the bytes of a request with this module.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kvloom.errors import InvalidInputError
from kvloom.spec.bounds import Bounds
from kvloom.spec.keptlengths import KeptLengths
from kvloom.spec.kv import ATTENTION, KVSpec, LaneGroup
from kvloom.spec.lanestore import LaneStore, lane_store
from kvloom.spec.policy import PolicySpec
from kvloom.spec.steps import step_blocks, step_bytes

INSTRUCTION_TOKENS = 48
"""Most tokens, in any vocabulary, of the instruction to repeat the context and of the hint that follows."""


@dataclass(frozen=True)
class Footprint:
    """KV bytes of one request at several times, all in arena bytes (whole blocks of whole granules).

    `prefill` is the most while the prompt is processed, `settled` the bytes after its eviction and encoding, `decode`
    the most while tokens are generated, `end` the bytes after the last one, `peak` the most at any time. Admission
    counts `peak`.
    """

    prefill: Bounds
    settled: Bounds
    decode: Bounds
    end: Bounds
    peak: Bounds
    replay: int = 0

    def peak_of(self, sequences: int) -> int:
        """Return the most bytes of `sequences` that share a prompt and then continue, each with its own blocks."""
        if sequences == 1:
            return self.peak.high
        return max(self.peak.high, sequences * max(self.settled.high, self.decode.high))


def held_bytes(kv: KVSpec, policy: PolicySpec, held: Sequence[int], seen: int) -> int:
    """Return the bytes of a request whose lanes hold `held` tokens (one per lane), `seen` having been processed.

    Exact for any policy, given the actual lengths. A windowed lane holds the newest `held` of `seen` tokens, at their
    original slots in its blocks.
    """
    if len(held) != kv.num_lanes:
        raise InvalidInputError(f"{len(held)} lengths for {kv.num_lanes} lanes; give one per lane")
    total = 0
    for group in kv.groups:
        store = lane_store(kv, group, policy)
        for lane in group.lanes:
            if group.window is None:
                total += store.lane_bytes(held[lane])
            else:
                blocks = -(-seen // kv.block_size) - (seen - held[lane]) // kv.block_size
                total += blocks * group.block_bytes
    return total


def request_footprint(
    kv: KVSpec,
    policy: PolicySpec,
    prompt: int,
    output: int,
    chunk: int,
    *,
    layers: Collection[int] | None = None,
    replay: int | None = None,
) -> Footprint:
    """Return the KV bytes of one request of `prompt` + `output` tokens, its prompt processed in chunks of `chunk`.

    The last generated token is never written, so `prompt + output - 1` tokens are cached; planning counts one more,
    as admission does: without a policy, `peak` is at most `kv.request_bytes(prompt + output, chunk)`. With windowed
    lanes it is not exact, because their bytes depend on the division into steps. The caller may give the `layers` on
    which the policy acts (default: all that the method does not skip) and the tokens that a `replay` feeds (default:
    the most in any vocabulary). Raises `InvalidInputError` for lengths below 1.
    """
    if prompt < 1 or output < 0 or chunk < 1:
        raise InvalidInputError(f"prompt {prompt}, output {output}, chunk {chunk}; they must be at least 1, 0 and 1")
    for term in policy.triggers:
        if term.name == "chunk":  # no step goes beyond the next point at which the policy acts
            chunk = min(chunk, term.number("tokens"))
    zero = Bounds(0, 0)
    prefill, settled, end, decode, turning = zero, zero, zero, zero, zero
    for group, rule in _parts(kv, policy, layers):
        if group.window is not None:
            moments = _windowed(kv, rule, group, prompt, output, chunk)
        else:
            moments = _evicting(kv, rule, group, prompt, output, chunk, layers)
            if policy.store is not None and policy.store.get("encode") == "after":
                kept = _kept(kv, rule, group, prompt, prompt, layers)
                turning += kept.turning(kv, group, lane_store(kv, group, rule))
        a, b, c, d = moments
        if group.window is not None:
            turning += b
        prefill, settled, end, decode = prefill + a, settled + b, end + c, decode + d
    replay = replay_tokens(policy, prompt) if replay is None else replay
    again = _replay_bytes(kv, replay)
    prefill = Bounds(prefill.low, prefill.high + again)
    peak = prefill.union(settled).union(decode).union(turning)
    if not policy.evicts and policy.store is None:
        written = prompt + max(0, output - 1)
        peak = Bounds(step_bytes(kv, written - 1, written), kv.request_bytes(prompt + output, chunk))
    return Footprint(prefill, settled, decode, end, peak, again)


def future_bytes(
    kv: KVSpec,
    policy: PolicySpec,
    held: Sequence[int],
    prompt: int,
    seen: int,
    total: int,
    layers: Collection[int] | None = None,
) -> int | None:
    """Return the most bytes up to `total` tokens of a request whose lanes hold `held` now, after its prompt.

    A lane grows by the coming tokens, or up to its ceiling while generating; a lane above the ceiling does not grow::

        held ------- ceiling -------- held + total - seen --> tokens
               the least of both, and never less than held

    None where lanes share a budget or the data decides, so that later lengths do not follow from the present ones.
    """
    found = 0
    for group, rule in _parts(kv, policy, layers):
        if group.window is not None:
            most = kv.lane_blocks(total, group.window)
            filled = -(-seen // kv.block_size)
            blocks = [max(most, filled - (seen - held[lane]) // kv.block_size) for lane in group.lanes]
            found += sum(blocks) * group.block_bytes
            continue
        store, ceiling = lane_store(kv, group, rule), _kept(kv, rule, group, prompt, total, layers).high
        if not ceiling:
            return None
        by_layer = dict(zip(group.layers, ceiling, strict=True))
        for lane in group.lanes:
            now = held[lane]
            found += store.peak(now, max(now, min(now + total - seen, by_layer[kv.lane_layer[lane]])))
    return found


def replay_tokens(policy: PolicySpec, prompt: int) -> int:
    """Return the most tokens held beside the prompt while `policy` replays it; 0 when it does not."""
    kept = policy.tokens_kept(prompt)
    if not policy.needs.replay or (kept is not None and kept >= prompt):
        return 0
    return min(prompt, policy.needs.replay) + INSTRUCTION_TOKENS


def _replay_bytes(kv: KVSpec, tokens: int) -> int:
    """Return the most bytes of a replay: its tokens in every lane, and a copy of the block to which they are added."""
    blocks = -(-tokens // kv.block_size) + 1 if tokens else 0
    return sum(len(group.lanes) * group.block_bytes * blocks for group in kv.groups)


def _parts(kv: KVSpec, policy: PolicySpec, acting: Collection[int] | None) -> list[tuple[LaneGroup, PolicySpec]]:
    """Return the lane groups, each with its policy: layers that the policy skips keep all their tokens."""
    first = policy.layers_skipped
    parts: list[tuple[LaneGroup, PolicySpec]] = []
    for group in kv.groups:
        for whole in (True, False):
            layers = tuple(
                layer for layer in group.layers
                if (group.role != ATTENTION
                    or (layer < first if acting is None or group.window else layer not in acting)) is whole
            )  # fmt: skip
            lanes = tuple(lane for lane in group.lanes if kv.lane_layer[lane] in layers)
            if layers:
                rule = PolicySpec(store=policy.store) if whole else policy
                parts.append((LaneGroup(layers, lanes, group.window, group.block_bytes, group.role), rule))
    return parts


def _acting(kv: KVSpec, policy: PolicySpec, acting: Collection[int] | None) -> list[LaneGroup]:
    """Return the lane groups from which the policy evicts."""
    return [group for group, rule in _parts(kv, policy, acting) if rule.evicts and group.window is None]


_Moments = tuple[Bounds, Bounds, Bounds, Bounds]
"""Bytes while the prompt is processed, after it, after the last token, and the most in between."""


def _windowed(
    kv: KVSpec, policy: PolicySpec, group: LaneGroup, prompt: int, output: int, chunk: int
) -> _Moments:
    assert group.window is not None
    size, total = len(group.lanes) * group.block_bytes, prompt + output

    def between(tokens: int, step: int) -> Bounds:
        """Tokens behind the window are freed when the lane next needs a block, so up to one step's blocks remain."""
        most = kv.lane_blocks(tokens, group.window, step)
        return Bounds(size * step_blocks(kv, tokens, tokens, group.window), size * most)

    settled, end = between(prompt, chunk), between(total, chunk)
    last = (total - 1) // kv.block_size * kv.block_size
    if last >= prompt:
        # the last block was added by a step of one token at `last`, which freed the blocks behind the window; lanes
        # that a policy shortened may have added a block later, and freed further ones then
        amount = size * (-(-total // kv.block_size) - max(0, last - (group.window - 1)) // kv.block_size)
        end = Bounds(min(end.low, amount) if policy.evicts else amount, amount)
    # at least the blocks that the prompt's last token alone needs; at most those of the longest step anywhere
    least, most = step_blocks(kv, prompt - 1, prompt, group.window), kv.lane_blocks(prompt, group.window, chunk)
    prefill = Bounds(size * least, size * most)
    decode = Bounds(end.low, max(settled.high, size * kv.lane_blocks(total, group.window)))
    return prefill, settled, end, decode


def _evicting(
    kv: KVSpec,
    policy: PolicySpec,
    group: LaneGroup,
    prompt: int,
    output: int,
    chunk: int,
    acting: Collection[int] | None,
) -> _Moments:
    lanes = len(group.lanes)
    store = lane_store(kv, group, policy)
    kept = _kept(kv, policy, group, prompt, prompt, acting)
    settled = kept.bounds(kv, group, store)
    grown = _kept(kv, policy, group, prompt, prompt + output, acting)
    last = _last(policy, kept, grown, prompt, output)
    end, decode = last.bounds(kv, group, store), grown.highest(kv, group, store)
    streaming = policy.store is not None and policy.store.get("encode") == "streaming"
    writing = store if streaming else LaneStore(kv.block_size, group.block_bytes, None)
    part = policy.when.chunk
    if part is not None and prompt > part:
        growing = sum(limit is not None for limit in _limits(kv, policy, group, prompt)) or lanes
        most = kept.plus(part, prompt, growing).highest(kv, group, writing)
    else:
        tail = group.block_bytes * (-(-chunk // kv.block_size) + 1) if streaming else 0
        dense = group.block_bytes * -(-prompt // kv.block_size)
        low = lanes * writing.lane_bytes(prompt)
        most = Bounds(low, max(low, lanes * min(writing.lane_bytes(prompt) + tail, dense)))
    return most, settled, end, decode


def _limits(kv: KVSpec, policy: PolicySpec, group: LaneGroup, prompt: int) -> list[int | None]:
    """Return the most tokens that the method leaves in each lane of `group`; None where it has no limit."""
    limits = policy.method.lane_limits
    found = None if limits is None else limits(dict(policy.selector.args), kv)
    return [None if found is None else found[lane] for lane in group.lanes]


def _settled(policy: PolicySpec, prompt: int, goal: int) -> int:
    """Return what a lane with a budget of `goal` keeps of a prompt when the prompt is complete."""
    when = policy.when
    if when.prefill or when.chunk is not None:
        return min(prompt, goal)
    return prompt if when.slack is None or prompt - goal <= when.slack else min(prompt, goal)


def _last(policy: PolicySpec, start: KeptLengths, grown: KeptLengths, prompt: int, output: int) -> KeptLengths:
    """Return the lengths after `output` tokens: those of `grown`, or exact ones where the steps of eviction are known.

    From `start` on, lanes of one length grow by a token a step. The policy acts as soon as they exceed the budget by
    more than its slack, or after every so many tokens.
    """
    goal = policy.tokens_kept(1 << 62) if policy.selector.get("keep") is None else policy.tokens_kept(prompt)
    every, slack = policy.when.every, policy.when.slack
    uniform = policy.lengths_known and policy.sharing.even and len(set(start.high)) == 1
    one = (every is None) is not (slack is None)
    if not (policy.evicts and uniform and start.low == start.high and one and goal is not None and output):
        return grown
    held = start.high[0]
    if every is not None:
        past = output % every
        found = held + output if output < every else min(goal, held + output - past) + past
    else:
        assert slack is not None
        if slack and not policy.method.budgeted:
            return grown  # a selector counts the tokens since it last acted, not those above a budget
        first = max(1, goal + slack + 1 - held)
        found = held + output if output < first else goal + (output - first) % (slack + 1)
    lengths = (found,) * len(start.high)
    return KeptLengths(lengths, lengths, 0, 0, found, found)


def _kept(
    kv: KVSpec, policy: PolicySpec, group: LaneGroup, prompt: int, seen: int, acting: Collection[int] | None
) -> KeptLengths:
    """Return what the lanes of `group` hold when `seen` tokens were processed, the first `prompt` in the prompt."""
    layers, output = group.layers, seen - prompt
    slack = policy.when.excess if output else None
    average = policy.tokens_kept(prompt)
    lanes = len(group.lanes)
    if average is None or policy.sharing.acts_always:
        limits = _limits(kv, policy, group, prompt) if average is None else [average] * lanes
        tops = [prompt if limit is None else _settled(policy, prompt, limit) for limit in limits]
        tops = [top + output if limit is None or slack is None else min(top + output, max(top, limit) + slack)
                for top, limit in zip(tops, limits, strict=True)]  # fmt: skip
        least = 0 if slack is not None else output
        return KeptLengths((), (), lanes * least, sum(tops), least, max(tops))
    goal = policy.tokens_kept(1 << 62) if policy.selector.get("keep") is None else average
    assert goal is not None
    if not policy.evicts:
        goal = seen
    if policy.sharing.ragged and goal < (prompt if slack is None else seen):
        return _ragged(kv, policy, group, acting, _settled(policy, prompt, goal), goal, prompt, seen, slack)
    shares = policy.sharing.layer_shares
    if shares is not None and prompt > average:
        order = sorted(layer for g in _acting(kv, policy, acting) for layer in g.layers)
        protected = min(average, policy.tokens_protected(average))
        sizes = shares(dict(policy.budget.args), average, protected, len(order), prompt)
        goals = [sizes[order.index(layer)] for layer in layers]
    else:
        goals = [goal] * len(layers)
    starts = [_settled(policy, prompt, n) if policy.evicts else prompt for n in goals]
    if slack is None:
        high = tuple(start + output for start in starts)
        low = high
    else:
        high = tuple(min(a + output, max(a, b) + slack) for a, b in zip(starts, goals, strict=True))
        low = tuple(min(a + output, b) for a, b in zip(starts, goals, strict=True))
    counts = [kv.layers[layer].num_lanes for layer in layers]
    return KeptLengths(low, high, sum(n * c for n, c in zip(low, counts, strict=True)),
                 sum(n * c for n, c in zip(high, counts, strict=True)), min(low), max(high))


def _ragged(
    kv: KVSpec,
    policy: PolicySpec,
    group: LaneGroup,
    acting: Collection[int] | None,
    average: int,
    goal: int,
    prompt: int,
    seen: int,
    slack: int | None,
) -> KeptLengths:
    lanes, output = len(group.lanes), seen - prompt
    share = 0.0 if policy.sharing.floor is None else float(policy.budget.get(policy.sharing.floor) or 0.0)
    floor = min(average, int(goal * share))
    grown = output if slack is None else min(output, max(0, goal - average) + slack)
    low_total = high_total = lanes * average
    if policy.sharing.spans_layers:
        others = sum(len(g.lanes) for g in _acting(kv, policy, acting)) - lanes
        whole = (others + lanes) * average
        low_total, high_total = max(lanes * floor, whole - others * prompt), min(lanes * prompt, whole - others * floor)
    steady = output if slack is None else 0
    return KeptLengths((), (), low_total + lanes * steady, high_total + lanes * grown, floor + steady, seen)
