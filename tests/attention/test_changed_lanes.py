"""Attention over lanes that are compacted, encoded or shared during a generation, against dense attention."""

import numpy as np
import pytest
import torch

from harness.dense_attention import CheckedBackend, DenseBackend, through_int8
from harness.tiny_model import batch_of, cache_of, feed, random_tokens, random_weights, tiny_config, tiny_decoder
from harness.tolerances import ATTENTION_BFLOAT16, ATTENTION_FLOAT32, LOGITS_SAME_WEIGHTS
from kvloom.attention.reference import ReferenceBackend
from kvloom.cache.kvcache import KVCache
from kvloom.cache.laneprefixes import LanePrefixes
from kvloom.cache.prefix import PrefixChain
from kvloom.errors import InvalidInputError, UnsupportedError
from kvloom.models.compiled import CompiledModel
from kvloom.models.decoder import Decoder
from kvloom.models.eager import EagerModel
from kvloom.models.model import Model, StepWanted
from kvloom.spec.store import SLAB_BYTES

P = 16
ALIBI = (0.03, 0.02, 0.01, 0.005)
"""Slopes so slight that tokens count that are far away in tokens, and near in slots once others were lost."""


def build(family: str, kind: str) -> tuple[Model, KVCache, Decoder]:
    """Return a tiny model, its cache, and a decoder of the same weights for the oracle."""
    config = tiny_config("llama", slopes=ALIBI) if family == "alibi" else tiny_config(family)
    weights = random_weights(config)
    decoder = Decoder(config, weights)
    if kind == "eager":
        return EagerModel(decoder, ReferenceBackend()), cache_of(decoder), decoder
    spec = config.kv_spec(P, "fp32")
    model = CompiledModel(config, weights.items(), torch.float32)
    return model, KVCache(spec, 8 * SLAB_BYTES, 4, torch.float32, layout=model.layout), decoder


class Duet:
    """The model over the paged cache and the decoder over explicit lists, always fed the same tokens."""

    def __init__(self, family: str, kind: str) -> None:
        self.model, self.cache, self.decoder = build(family, kind)
        self.beside = DenseBackend(self.decoder.config)
        self.compared = 0

    def step(self, work: list[tuple[int, list[int]]]) -> list[int]:
        """Feed (sequence, tokens) pairs in one batch; compare the logits; return the most likely next tokens."""
        seen = [int(self.cache.lanes.seen[sequence]) for sequence, _ in work]
        for sequence, tokens in work:
            assert self.cache.lanes.extend(sequence, len(tokens))
        batch = batch_of([(sequence, at, tokens) for (sequence, tokens), at in zip(work, seen, strict=True)])
        everything = np.arange(batch.num_tokens, dtype=np.int32)
        output = self.model.step(batch, self.cache, StepWanted(everything))
        expected = self.decoder.logits(self.decoder.forward(batch, self.cache, self.beside))
        assert output.logits is not None
        assert (output.logits - expected).abs().max() < LOGITS_SAME_WEIGHTS
        self.compared += batch.num_tokens
        self.cache.check_invariants()
        return [output.greedy[end - 1] for end in batch.cu_seqlens_q[1:]]

    def compact(self, sequence: int, rng: np.random.Generator) -> dict[int, int]:
        """Keep another random number of random tokens in every lane that can lose any; returns lane -> kept."""
        keep = {}
        for layer, view in enumerate(self.cache.layers):
            if view.window is not None:
                continue
            for head in range(view.num_lanes):
                lane = view.first + head
                held = int(self.cache.lanes.held[sequence, lane])
                number = int(rng.choice([0, 1, held // 7, held // 3, held - 1]))
                keep[lane] = np.sort(rng.choice(held, number, replace=False)).astype(np.int64)
                self.beside.dense.keep(sequence, layer, head, keep[lane].tolist())
        assert self.cache.compact(sequence, keep)
        self.cache.check_invariants()
        return {lane: len(slots) for lane, slots in keep.items()}

    def encode(self, sequence: int, lanes: list[int], first: int, last: int) -> None:
        """Send full blocks in columns first .. last - 1 of some lanes to int8.

        The oracle takes over what they decode to, which is what it would round to itself or the next code: a number
        within rounding errors of the edge between two codes may fall either way.
        """
        assert self.cache.encoder.encode(sequence, lanes, "int8", first, last)
        for lane in lanes:
            layer = self.cache.spec.lane_layer[lane]
            entries = self.beside.dense.lanes[sequence, layer, lane - self.cache.layers[layer].first]
            decoded = self.cache.read_lane(sequence, lane)
            for i in range(first * P, last * P):
                *before, position = entries[i]
                for x, after in zip(before, (side[i] for side in decoded), strict=True):
                    step = x.abs().max() / 127
                    off = (through_int8(x) - after).abs()
                    assert off.max() < 1.001 * step and (off > 0.001 * step).sum() <= 1
                entries[i] = (decoded[0][i], decoded[1][i], position)
        self.cache.check_invariants()


@pytest.mark.parametrize("kind", ["eager", "cpu"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "alibi"])
@pytest.mark.parametrize("seed", [0, 1])
def test_generation_over_lanes_cut_to_random_unequal_lengths_equals_dense_attention_over_what_is_left(
    family: str, kind: str, seed: int
) -> None:
    duet, rng = Duet(family, kind), np.random.default_rng(seed)
    lanes, spec = duet.cache.lanes, duet.cache.spec
    cut, other = lanes.open(), lanes.open()
    (token,) = duet.step([(cut, random_tokens(130, seed=1))])
    (third,) = duet.step([(other, random_tokens(40, seed=2))])
    for place in range(60):
        if place in (5, 6, 30):  # in the middle; twice in a row; and again, when blocks have been closed since
            before, held = duet.cache.arena.used_bytes, lanes.held[cut].copy()
            kept = duet.compact(cut, rng)
            assert {lane: int(lanes.held[cut, lane]) for lane in kept} == kept
            assert len(set(kept.values())) > 1 or len(kept) == 1
            freed = sum(
                spec.layer_block_bytes(spec.lane_layer[lane]) * (-(-int(held[lane]) // P) - -(-number // P))
                for lane, number in kept.items()
            )
            assert duet.cache.arena.used_bytes == before - freed
            # what was given back is written by another request at once
            duet.step([(other, random_tokens(23, seed=place))])
        token, third = duet.step([(cut, [token]), (other, [third])])
    assert lanes.seen[cut] == 190 and len(lanes.positions_of(cut, 0)) <= 190
    lanes.close(cut)
    lanes.close(other)
    assert duet.cache.arena.used_bytes == 0


def test_a_compacted_sequence_takes_a_further_prompt_in_chunks() -> None:
    """The next turn of a conversation: many queries at once over ragged lanes."""
    duet, rng = Duet("llama", "eager"), np.random.default_rng(3)
    sequence = duet.cache.lanes.open()
    duet.step([(sequence, random_tokens(100))])
    duet.compact(sequence, rng)
    for chunk in (1, 17, 40, 3):
        duet.step([(sequence, random_tokens(chunk, seed=chunk))])
    assert duet.compared == 161


def test_forks_of_a_compacted_sequence_go_their_own_ways() -> None:
    duet, rng = Duet("llama", "eager"), np.random.default_rng(4)
    parent = duet.cache.lanes.open()
    duet.step([(parent, random_tokens(75))])
    duet.compact(parent, rng)
    child = duet.cache.lanes.fork(parent)
    duet.beside.dense.fork(parent, child)
    for place in range(20):
        duet.step([(parent, random_tokens(1, seed=place)), (child, random_tokens(2, seed=100 + place))])
        if place == 7:
            duet.compact(child, rng)


def test_lanes_of_full_length_compacted_to_everything_change_nothing() -> None:
    decoder = tiny_decoder("llama")
    cache, tokens = cache_of(decoder), random_tokens(60)
    plain, kept = cache.lanes.open(), cache.lanes.open()
    for sequence in (plain, kept):
        feed(decoder, cache, sequence, tokens[:50])
    assert cache.compact(kept, {lane: np.arange(50) for lane in range(cache.spec.num_lanes)})
    assert torch.equal(feed(decoder, cache, plain, tokens[50:]), feed(decoder, cache, kept, tokens[50:]))


# ---- segments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.bfloat16, ATTENTION_BFLOAT16),
        (torch.float16, ATTENTION_BFLOAT16),
        (torch.float32, ATTENTION_FLOAT32),
    ],
)
def test_a_lane_of_16_bit_then_int8_then_16_bit_segments_equals_dense_attention(
    dtype: torch.dtype, tolerance: float
) -> None:
    decoder = tiny_decoder("llama", dtype)
    cache = cache_of(decoder)
    checked = CheckedBackend(ReferenceBackend(), decoder.config, tolerance)
    sequence, native = cache.lanes.open(), P * 32 * dtype.itemsize
    feed(decoder, cache, sequence, random_tokens(120), backend=checked)
    feed(decoder, cache, sequence, random_tokens(8, seed=1), backend=checked, chunk=1)
    assert cache.bytes_in_use == 6 * 8 * native  # 128 tokens: 8 blocks in each of 3 layers x 2 lanes

    # lane 3 (head 1 of layer 1): two blocks of sinks stay, four are encoded, two of the newest stay; lane 0: one is
    assert cache.encoder.encode(sequence, [3], "int8", 2, 6)
    checked.beside.dense.encode(sequence, 1, 1, 2 * P, 6 * P)
    assert cache.encoder.encode(sequence, [0], "int8", 0, 1)
    checked.beside.dense.encode(sequence, 0, 0, 0, P)
    cache.check_invariants()
    int8 = 640  # 16 x 32 codes + 2 x 16 scales of 4 bytes
    assert cache.bytes_in_use == 43 * native + 5 * int8
    assert cache.lanes.sequence_bytes(sequence) == 43 * native + 5 * int8

    before = checked.compared
    feed(decoder, cache, sequence, random_tokens(30, seed=2), backend=checked, chunk=1)
    assert cache.encoder.encode(sequence, [3], "int8", 6, 8)  # the encoded run grows while the generation goes on
    checked.beside.dense.encode(sequence, 1, 1, 6 * P, 8 * P)
    feed(decoder, cache, sequence, random_tokens(40, seed=3), backend=checked, chunk=7)
    assert checked.compared == before + 3 * (30 + 6)
    assert cache.bytes_in_use == (6 * 13 - 7) * native + 7 * int8  # 198 tokens: 13 blocks a lane
    cache.lanes.close(sequence)
    assert cache.arena.used_bytes == 0


@pytest.mark.parametrize("kind", ["eager", "cpu"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generation_over_lanes_with_encoded_runs_equals_dense_attention_over_what_they_decode_to(
    family: str, kind: str
) -> None:
    """Sinks and newest tokens in 16 bit, as KIVI keeps them; runs that differ by lane; forks; other sequences."""
    duet = Duet(family, kind)
    unbounded = [0, 1, 2, 3, 4, 5] if family == "llama" else [2]
    coded, plain = duet.cache.lanes.open(), duet.cache.lanes.open()
    (token,) = duet.step([(coded, random_tokens(330, seed=1))])
    (other,) = duet.step([(plain, random_tokens(40, seed=2))])
    duet.encode(coded, unbounded, 1, 18)
    duet.encode(coded, unbounded[-1:], 0, 1)
    for _ in range(20):
        token, other = duet.step([(coded, [token]), (plain, [other])])
        residual = int(duet.cache.lanes.seen[coded]) - 2 * P  # 32 newest tokens stay as they are
        if residual % P == 0:
            duet.encode(coded, unbounded, residual // P - 1, residual // P)
    child = duet.cache.lanes.fork(coded)
    duet.beside.dense.fork(coded, child)
    duet.encode(child, unbounded, 19, 20)
    for place in range(3):
        duet.step([(coded, random_tokens(1, seed=place)), (child, random_tokens(2, seed=place))])
    duet.step([(coded, random_tokens(60, seed=9)), (plain, random_tokens(30, seed=10))])  # another prompt
    duet.cache.lanes.close(coded)
    again = duet.cache.lanes.open()
    assert again == coded  # the row of the encoded one
    duet.beside.dense.lanes = {key: entries for key, entries in duet.beside.dense.lanes.items() if key[0] != again}
    duet.step([(again, random_tokens(50, seed=11)), (child, random_tokens(1))])
    for sequence in (plain, child, again):
        duet.cache.lanes.close(sequence)
    assert duet.cache.arena.used_bytes == 0


def test_encoding_really_loses_something() -> None:
    """Otherwise the test above would prove nothing."""
    decoder = tiny_decoder("llama")
    cache, tokens = cache_of(decoder), random_tokens(70)
    exact, coded = cache.lanes.open(), cache.lanes.open()
    for sequence in (exact, coded):
        feed(decoder, cache, sequence, tokens[:64])
    assert cache.encoder.encode(coded, [0, 1, 2, 3, 4, 5], "int8", 0, 4)
    difference = (feed(decoder, cache, exact, tokens[64:]) - feed(decoder, cache, coded, tokens[64:])).abs().max()
    assert 10 * LOGITS_SAME_WEIGHTS < difference < 1


def test_compaction_happens_before_encoding_or_not_at_all() -> None:
    decoder = tiny_decoder("gemma3")
    cache = cache_of(decoder)
    sequence = cache.lanes.open()
    feed(decoder, cache, sequence, random_tokens(64))
    assert cache.encoder.encode(sequence, [2], "int8", 0, 2)
    keep = {0: np.arange(3), 2: np.arange(3)}
    with pytest.raises(UnsupportedError) as refused:
        cache.compact(sequence, keep)
    assert refused.value.reasons == (
        "lane 0 has a sliding window, which alone frees its blocks",
        "lane 2 has encoded blocks; select before encoding",
    )
    with pytest.raises(UnsupportedError, match="small windows stay in 16 bit"):
        cache.encoder.encode(sequence, [0], "int8", 3, 4)
    with pytest.raises(UnsupportedError, match="a block is encoded once"):
        cache.encoder.encode(sequence, [2], "int8", 1, 3)
    with pytest.raises(InvalidInputError, match="not all full blocks"):
        cache.encoder.encode(sequence, [2], "int8", 3, 5)
    with pytest.raises(InvalidInputError, match="takes each lane once and a store among"):
        cache.encoder.encode(sequence, [2, 2], "int8", 3, 4)
    with pytest.raises(InvalidInputError, match="unknown store 'int7'"):
        cache.encoder.encode(sequence, [2], "int7", 3, 4)
    cache.check_invariants()


@pytest.mark.parametrize("slots", [[-1, 3], [3, 64], [5, 5], [6, 5]])
def test_slots_that_a_lane_does_not_hold_cannot_be_kept(slots: list[int]) -> None:
    decoder = tiny_decoder("llama")
    cache = cache_of(decoder)
    sequence = cache.lanes.open()
    feed(decoder, cache, sequence, random_tokens(64))
    with pytest.raises(InvalidInputError, match=r"lane 1 holds slots 0..63; keep must be ascending slots among them"):
        cache.compact(sequence, {1: np.array(slots)})


# ---- sharing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_compacting_one_sharer_of_a_prefix_does_not_change_a_bit_of_the_other(family: str) -> None:
    decoder = tiny_decoder(family)
    prefix, question, answer = random_tokens(1000), random_tokens(30, seed=1), random_tokens(25, seed=2)

    def run(with_compaction: bool) -> tuple[torch.Tensor, KVCache]:
        cache = cache_of(decoder)
        first = cache.lanes.open()
        feed(decoder, cache, first, prefix, chunk=64)
        LanePrefixes(cache.lanes).publish(first, PrefixChain(), prefix, 0, 1000 // P)
        second = cache.lanes.open()
        match = cache.index.match([*prefix, *question], PrefixChain(), 1029)
        assert match.num_blocks == 62
        LanePrefixes(cache.lanes).adopt(second, match)
        logits = [feed(decoder, cache, second, [*prefix[992:], *question])]
        for place, token in enumerate(answer):
            if with_compaction and place in (3, 12):
                rng = np.random.default_rng(place)
                shared = cache.lanes.table[second].copy()
                content = [[t.clone() for t in cache.read_lane(second, lane)] for lane in range(cache.spec.num_lanes)]
                keep = {}
                for layer, view in enumerate(cache.layers):
                    for lane in range(view.first, view.first + view.num_lanes):
                        if cache.layers[layer].window is None:
                            held = int(cache.lanes.held[first, lane])
                            keep[lane] = np.sort(rng.choice(held, held // 3 + lane, replace=False))
                assert cache.compact(first, keep)
                cache.check_invariants()
                feed(decoder, cache, first, random_tokens(50, seed=place), chunk=10)  # and it writes on
                assert (cache.lanes.table[second] == shared).all()
                for lane, (k, v) in enumerate(content):
                    now_k, now_v = cache.read_lane(second, lane)
                    assert torch.equal(k, now_k) and torch.equal(v, now_v)
            logits.append(feed(decoder, cache, second, [token]))
        return torch.cat(logits), cache

    plain, _ = run(with_compaction=False)
    beside, cache = run(with_compaction=True)
    assert torch.equal(plain, beside)
    third = cache.lanes.open()
    match = cache.index.match(prefix, PrefixChain(), 999)
    assert match.num_blocks == 62  # and the index still has the whole prefix
    LanePrefixes(cache.lanes).adopt(third, match)
    fresh = cache_of(decoder)
    alone = fresh.lanes.open()
    expected = feed(decoder, fresh, alone, prefix, chunk=64)[992:]
    assert (feed(decoder, cache, third, prefix[992:]) - expected).abs().max() < LOGITS_SAME_WEIGHTS


def test_blocks_of_a_compacted_sharer_come_back_when_the_others_are_gone() -> None:
    decoder = tiny_decoder("llama")
    cache, tokens = cache_of(decoder), random_tokens(320)
    first = cache.lanes.open()
    feed(decoder, cache, first, tokens, chunk=64)
    LanePrefixes(cache.lanes).publish(first, PrefixChain(), tokens, 0, 20)
    second = cache.lanes.fork(first)
    block = 2048  # 16 x 32 x 4
    assert cache.arena.used_bytes == 6 * 20 * block
    assert cache.compact(first, {lane: np.arange(0, 320, 10) for lane in range(6)})  # 32 tokens: two blocks a lane
    assert cache.arena.used_bytes == 6 * (20 + 2) * block
    cache.lanes.close(second)
    assert cache.bytes_in_use == 6 * 2 * block and cache.index.idle_bytes == 6 * 20 * block
    assert sum(cache.index.reclaim()) == 6 * 20 * block
    assert cache.arena.used_bytes == 6 * 2 * block
