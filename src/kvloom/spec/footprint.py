"""KV bytes of a request under a policy: exact where lengths are known beforehand, else bounds that hold.

A lane under a store keeps its first sinks and newest tokens in the native store, the rest encoded in whole blocks::

    | sinks, native | e blocks, encoded | residual and open block, native |
    0 ------------- ks ---------------- ks + e P ------------------------ n --> tokens held
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvloom.errors import InvalidInputError
from kvloom.spec.budget import pyramid_budgets
from kvloom.spec.format import store_format
from kvloom.spec.kv import KVSpec, LaneGroup
from kvloom.spec.method import METHODS
from kvloom.spec.policy import PolicySpec

INSTRUCTION_TOKENS = 48
"""Most tokens of the words that ask a model to repeat its context, in any vocabulary, and of the hint that follows."""


@dataclass(frozen=True)
class Bounds:
    """At least `low` and at most `high` bytes; equal when the figure is exact."""

    low: int
    high: int

    def __add__(self, other: "Bounds") -> "Bounds":
        return Bounds(self.low + other.low, self.high + other.high)

    @property
    def exact(self) -> bool:
        """True when both ends agree."""
        return self.low == self.high

    def union(self, other: "Bounds") -> "Bounds":
        """Return the bounds of the larger of two figures."""
        return Bounds(max(self.low, other.low), max(self.high, other.high))


@dataclass(frozen=True)
class Footprint:
    """KV bytes of one request at several moments, all in arena bytes (whole blocks of whole granules).

    `prefill` is the most while the prompt is processed, `settled` after it was evicted and encoded, `decode` the most
    while tokens are generated, `end` after the last one, `peak` the most at any time: what admission must count.
    """

    prefill: Bounds
    settled: Bounds
    decode: Bounds
    end: Bounds
    peak: Bounds


@dataclass(frozen=True)
class LaneStore:
    """How one lane stores tokens: bytes of a native and of an encoded block, and what stays native."""

    block_size: int
    native_bytes: int
    encoded_bytes: int | None
    sinks: int = 0
    residual: int = 0

    def blocks(self, held: int) -> tuple[int, int]:
        """Return the (native, encoded) blocks of a lane that holds `held` tokens."""
        if self.encoded_bytes is None:
            return -(-held // self.block_size), 0
        kept = min(held, -(-self.sinks // self.block_size) * self.block_size)
        rest = held - kept
        encoded = max(0, rest - self.residual) // self.block_size
        return -(-kept // self.block_size) + -(-(rest - encoded * self.block_size) // self.block_size), encoded

    def lane_bytes(self, held: int) -> int:
        """Return the bytes of a lane that holds `held` tokens."""
        native, encoded = self.blocks(held)
        return native * self.native_bytes + encoded * (self.encoded_bytes or 0)

    def fewest(self, low: int, high: int) -> int:
        """Return the least bytes of a lane that holds from `low` to `high` tokens; encoding a block may save some."""
        if self.encoded_bytes is None:
            return self.lane_bytes(low)
        return min(self.lane_bytes(held) for held in range(low, min(high, low + self.block_size) + 1))

    def most(self, low: int, high: int) -> int:
        """Return the most bytes of a lane that holds from `low` to `high` tokens, just before a block is encoded."""
        if self.encoded_bytes is None:
            return self.lane_bytes(high)
        return max(self.lane_bytes(held) for held in range(max(low, high - self.block_size), high + 1))

    def ragged_bytes(self, lanes: int, total: int, least: int, most: int) -> Bounds:
        """Return bounds over all ways in which `lanes` lanes hold `total` tokens, each from `least` to `most`."""
        size = self.block_size
        blocks = min(lanes * -(-most // size), (total + lanes * (size - 1)) // size)
        if self.encoded_bytes is None:
            low = max(lanes * -(-least // size), -(-total // size))
            return Bounds(low * self.native_bytes, blocks * self.native_bytes)
        open_blocks = -(-self.sinks // size) + -(-(self.residual + size - 1) // size)
        native = min(blocks, lanes * open_blocks)
        cheapest = min(self.native_bytes, self.encoded_bytes)
        high = native * self.native_bytes + min(blocks, total // size) * self.encoded_bytes
        return Bounds(-(-total // size) * cheapest, min(high, blocks * max(self.native_bytes, self.encoded_bytes)))


def lane_store(kv: KVSpec, group: LaneGroup, policy: PolicySpec) -> LaneStore:
    """Return how lanes of `group` are stored under `policy`; windowed lanes stay native.

    Raises `InvalidInputError` when the block size does not suit the store.
    """
    if policy.store is None or policy.store.name == kv.store or group.window is not None:
        return LaneStore(kv.block_size, group.block_bytes, None)
    layer = kv.layers[group.layers[0]]
    store = store_format(policy.store.name)
    if kv.block_size % store.group:
        raise InvalidInputError(
            f"store {store.name} encodes {store.group} tokens together, and block size {kv.block_size} is no multiple. "
            f"Use --block-size {-(-kv.block_size // store.group) * store.group}"
        )
    encoded = store.block_bytes(kv.block_size, layer.k_width, layer.v_width)
    return LaneStore(kv.block_size, group.block_bytes, encoded,
                     policy.store.number("sinks"), policy.store.number("residual"))


def window_blocks(kv: KVSpec, seen: int, window: int) -> int:
    """Return the fewest blocks of a windowed lane: those that hold one of the next query's keys."""
    begin = max(0, seen - (window - 1))
    return -(-seen // kv.block_size) - begin // kv.block_size


def held_bytes(kv: KVSpec, policy: PolicySpec, held: Sequence[int], seen: int) -> int:
    """Return the bytes of a request whose lanes hold `held` tokens (one per lane), `seen` having been processed.

    Exact for any policy once the real lengths are known. A windowed lane holds the newest `held` of `seen` tokens, at
    their own places in its blocks.
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


def request_footprint(kv: KVSpec, policy: PolicySpec, prompt: int, output: int, chunk: int) -> Footprint:
    """Return the KV bytes of one request of `prompt` + `output` tokens, its prompt processed in chunks of `chunk`.

    The last generated token is never written, so `prompt + output - 1` tokens are cached; planning counts one more,
    as admission does: without a policy, `peak` is `kv.request_bytes(prompt + output, chunk)`. Raises
    `InvalidInputError` for lengths below 1.
    """
    if prompt < 1 or output < 0 or chunk < 1:
        raise InvalidInputError(f"prompt {prompt}, output {output}, chunk {chunk}; they must be at least 1, 0 and 1")
    zero = Bounds(0, 0)
    prefill, settled, end, decode = zero, zero, zero, zero
    for group, rule in _parts(kv, policy):
        moments = _windowed if group.window is not None else _evicting
        a, b, c, d = moments(kv, rule, group, prompt, output, chunk)
        prefill, settled, end, decode = prefill + a, settled + b, end + c, decode + d
    prefill = Bounds(prefill.low, prefill.high + _replay_bytes(kv, policy, prompt))
    peak = prefill.union(settled).union(decode)
    if not policy.evicts and policy.store is None:
        whole = kv.request_bytes(prompt + output, chunk)
        peak = Bounds(whole, whole)
    return Footprint(prefill, settled, decode, end, peak)


def replay_tokens(policy: PolicySpec, prompt: int) -> int:
    """Return the most tokens that are held beside the prompt while `policy` reads it again; 0 when it does not."""
    kept = policy.tokens_kept(prompt)
    if not METHODS.get(policy.selector.name).replays or (kept is not None and kept >= prompt):
        return 0
    return min(prompt, policy.selector.number("chunk")) + INSTRUCTION_TOKENS


def _replay_bytes(kv: KVSpec, policy: PolicySpec, prompt: int) -> int:
    """Return the most bytes of a replay: its tokens in every lane, and a copy of the block that they go on in."""
    tokens = replay_tokens(policy, prompt)
    blocks = -(-tokens // kv.block_size) + 1 if tokens else 0
    return sum(len(group.lanes) * group.block_bytes * blocks for group in kv.groups)


def _parts(kv: KVSpec, policy: PolicySpec) -> list[tuple[LaneGroup, PolicySpec]]:
    """Return the lane groups with the policy that rules them: layers that it skips keep all their tokens."""
    skipped = policy.selector.get("skip_layers")
    first = skipped if isinstance(skipped, int) else 0
    parts: list[tuple[LaneGroup, PolicySpec]] = []
    for group in kv.groups:
        for whole in (True, False):
            layers = tuple(layer for layer in group.layers if (layer < first) is whole)
            lanes = tuple(lane for lane in group.lanes if kv.lane_layer[lane] in layers)
            if layers:
                rule = PolicySpec(store=policy.store) if whole else policy
                parts.append((LaneGroup(layers, lanes, group.window, group.block_bytes), rule))
    return parts


def _acting(kv: KVSpec, policy: PolicySpec) -> list[LaneGroup]:
    """Return the lane groups from which the policy evicts."""
    return [group for group, rule in _parts(kv, policy) if rule.evicts and group.window is None]


_Moments = tuple[Bounds, Bounds, Bounds, Bounds]
"""Bytes while the prompt is processed, after it, after the last token, and the most in between."""


def _windowed(
    kv: KVSpec, policy: PolicySpec, group: LaneGroup, prompt: int, output: int, chunk: int
) -> _Moments:
    assert group.window is not None
    size, total = len(group.lanes) * group.block_bytes, prompt + output

    def between(tokens: int, step: int) -> Bounds:
        """What left the window is freed when a lane next needs a block, so that up to a step's blocks linger."""
        most = kv.lane_blocks(tokens, group.window, step)
        return Bounds(size * window_blocks(kv, tokens, group.window or 0), size * most)

    settled, end = between(prompt, chunk), between(total, chunk)
    last = (total - 1) // kv.block_size * kv.block_size
    if last >= prompt and not policy.evicts:
        # the last block was added by a step of one token at `last`, which trimmed the window then
        amount = size * (-(-total // kv.block_size) - max(0, last - (group.window - 1)) // kv.block_size)
        end = Bounds(amount, amount)
    prefill = size * kv.lane_blocks(prompt, group.window, chunk)
    decode = Bounds(end.low, max(settled.high, size * kv.lane_blocks(total, group.window)))
    return Bounds(prefill, prefill), settled, end, decode


def _evicting(
    kv: KVSpec, policy: PolicySpec, group: LaneGroup, prompt: int, output: int, chunk: int
) -> _Moments:
    lanes = len(group.lanes)
    store = lane_store(kv, group, policy)
    kept = _kept(kv, policy, group, prompt, prompt)
    settled = kept.bounds(kv, group, store)
    grown = _kept(kv, policy, group, prompt, prompt + output)
    last = _last(policy, kept, grown, prompt, output)
    end, decode = last.bounds(kv, group, store), grown.highest(kv, group, store)
    streaming = policy.store is not None and policy.store.get("encode") == "streaming"
    writing = store if streaming else LaneStore(kv.block_size, group.block_bytes, None)
    parts = [term.number("tokens") for term in policy.triggers if term.name == "chunk"]
    if parts and prompt > parts[0]:
        most = kept.plus(parts[0], prompt, lanes).highest(kv, group, writing)
    else:
        tail = group.block_bytes * (-(-chunk // kv.block_size) + 1) if streaming else 0
        dense = group.block_bytes * -(-prompt // kv.block_size)
        low = lanes * writing.lane_bytes(prompt)
        most = Bounds(low, max(low, lanes * min(writing.lane_bytes(prompt) + tail, dense)))
    return most, settled, end, decode


@dataclass(frozen=True)
class _Kept:
    """Tokens that the lanes of a group hold: from `low` to `high` per layer where lengths are known, else totals."""

    low: tuple[int, ...]
    high: tuple[int, ...]
    low_total: int
    high_total: int
    least: int
    most: int

    def plus(self, tokens: int, limit: int, lanes: int) -> "_Kept":
        """Return the lengths when up to `tokens` more are held on top in `lanes` lanes, none above `limit`."""
        return _Kept(self.low, tuple(min(limit, n + tokens) for n in self.high), self.low_total,
                     self.high_total + lanes * tokens, self.least, min(limit, self.most + tokens))

    def bounds(self, kv: KVSpec, group: LaneGroup, store: LaneStore) -> Bounds:
        """Return the bytes of the group in between the lengths."""
        if not self.high:
            return self._ragged(group, store)
        low = high = 0
        for a, b, layer in zip(self.low, self.high, group.layers, strict=True):
            lanes = kv.layers[layer].num_lanes
            low += lanes * store.fewest(a, b)
            high += lanes * store.most(a, b)
        return Bounds(low, high)

    def highest(self, kv: KVSpec, group: LaneGroup, store: LaneStore) -> Bounds:
        """Return the most bytes that the group has on the way to its lengths."""
        if not self.high:
            return self._ragged(group, store)
        most = 0
        for b, layer in zip(self.high, group.layers, strict=True):
            most += kv.layers[layer].num_lanes * store.most(0, b)
        return Bounds(self.bounds(kv, group, store).low, most)

    def _ragged(self, group: LaneGroup, store: LaneStore) -> Bounds:
        lanes = len(group.lanes)
        low = store.ragged_bytes(lanes, self.low_total, self.least, self.most).low
        return Bounds(low, store.ragged_bytes(lanes, self.high_total, self.least, self.most).high)


def _slack(policy: PolicySpec) -> int | None:
    """Return by how many tokens a lane may exceed its budget while generating; None when nothing is evicted then."""
    limits = [1 if term.name == "step" else term.number("tokens") + (term.name == "slack")
              for term in policy.triggers if term.name in ("step", "slack", "every")]
    return min(limits, default=None)


def _settled(policy: PolicySpec, prompt: int, goal: int) -> int:
    """Return what a lane with a budget of `goal` keeps of a prompt when the prompt is complete."""
    if policy.has_trigger("prefill") or policy.has_trigger("chunk"):
        return min(prompt, goal)
    slack = _slack(policy)
    lazy = all(term.name == "every" for term in policy.triggers)
    return prompt if lazy or slack is None or prompt - goal < slack else min(prompt, goal)


def _last(policy: PolicySpec, start: _Kept, grown: _Kept, prompt: int, output: int) -> _Kept:
    """Return the lengths after `output` tokens: those of `grown`, or exact ones where the rhythm of evictions is known.

    From `start` on, lanes of one length grow by a token a step. The policy acts as soon as they exceed the budget by
    more than its slack, or after every so many tokens.
    """
    goal = policy.tokens_kept(1 << 62) if policy.selector.get("keep") is None else policy.tokens_kept(prompt)
    acts = [term for term in policy.triggers if term.name in ("step", "slack", "every")]
    uniform = policy.lengths_known and policy.budget.name == "uniform" and len(set(start.high)) == 1
    if not (policy.evicts and uniform and start.low == start.high and len(acts) == 1 and goal is not None and output):
        return grown
    held = start.high[0]
    if acts[0].name == "every":
        period = acts[0].number("tokens")
        past = output % period
        found = held + output if output < period else min(goal, held + output - past) + past
    else:
        slack = 0 if acts[0].name == "step" else acts[0].number("tokens")
        if slack and not METHODS.get(policy.selector.name).budgeted:
            return grown  # a selector counts the tokens since it last acted, not those above a budget
        first = max(1, goal + slack + 1 - held)
        found = held + output if output < first else goal + (output - first) % (slack + 1)
    lengths = (found,) * len(start.high)
    return _Kept(lengths, lengths, 0, 0, found, found)


def _kept(kv: KVSpec, policy: PolicySpec, group: LaneGroup, prompt: int, seen: int) -> _Kept:
    """Return what the lanes of `group` hold when `seen` tokens were processed, the first `prompt` in the prompt."""
    layers, output = group.layers, seen - prompt
    slack = _slack(policy) if output else None
    average = policy.tokens_kept(prompt)
    lanes = len(group.lanes)
    if average is None or policy.budget.name == "threshold":
        most = seen if average is None else min(seen, _settled(policy, prompt, average) + (slack or output))
        least = 0 if slack is not None else output
        return _Kept((), (), lanes * least, lanes * most, least, most)
    goal = policy.tokens_kept(1 << 62) if policy.selector.get("keep") is None else average
    assert goal is not None
    if not policy.evicts:
        goal = seen
    if METHODS.get(policy.budget.name).ragged and goal < (prompt if slack is None else seen):
        return _ragged(kv, policy, group, _settled(policy, prompt, goal), goal, prompt, seen, slack)
    if policy.budget.name == "pyramid" and prompt > average:
        order = sorted(layer for g in _acting(kv, policy) for layer in g.layers)
        sizes = pyramid_budgets(average, min(average, policy.tokens_protected(average)), len(order), prompt,
                                float(policy.budget.get("beta") or 20.0))
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
    return _Kept(low, high, sum(n * c for n, c in zip(low, counts, strict=True)),
                 sum(n * c for n, c in zip(high, counts, strict=True)), min(low), max(high))


def _ragged(
    kv: KVSpec, policy: PolicySpec, group: LaneGroup, average: int, goal: int, prompt: int, seen: int, slack: int | None
) -> _Kept:
    lanes, output = len(group.lanes), seen - prompt
    floor = min(average, int(goal * float(policy.budget.get("floor") or 0.0)))
    grown = output if slack is None else min(output, max(0, goal - average) + slack)
    low_total = high_total = lanes * average
    if policy.budget.name == "global":
        others = sum(len(g.lanes) for g in _acting(kv, policy)) - lanes
        whole = (others + lanes) * average
        low_total, high_total = max(lanes * floor, whole - others * prompt), min(lanes * prompt, whole - others * floor)
    steady = output if slack is None else 0
    return _Kept((), (), low_total + lanes * steady, high_total + lanes * grown, floor + steady, seen)
