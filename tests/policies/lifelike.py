"""Lanes filled by hand: the queries, keys and values of a sequence, from anywhere, under a policy without any model."""

import numpy as np
import torch

from kvloom.cache.kvcache import KVCache
from kvloom.policies.eviction import Eviction
from kvloom.policies.modelfacts import ModelFacts
from kvloom.policies.policy import Policy
from kvloom.policies.tokenkinds import TokenKinds
from kvloom.spec.kv import KVSpec, LayerKV
from kvloom.spec.store import SLAB_BYTES
from policies.brute_force import Layer

KINDS = TokenKinds(frozenset({0, 1}), frozenset({2, 3, 4}))


def rotate(x, theta):
    """Return x [n, heads, D] rotated by its positions, half-split pairs."""
    angles = np.arange(len(x))[:, None] * theta[None, :]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)


def random_layers(lanes, group, tokens, count=2, width=8, seed=0):
    """Return `count` layers of random tensors in float32 values, with rope."""
    rng = np.random.default_rng(seed)
    theta = 1.0 / 10000.0 ** (np.arange(width // 2) * 2 / width)
    heads = lanes * group
    layers = []
    for index in range(count):
        plain = rng.normal(size=(tokens, heads, width)) + rng.normal(size=(1, heads, width))
        k = rotate(rng.normal(size=(tokens, lanes, width)) * 1.5, theta)
        v = rng.normal(size=(tokens, lanes, width)) * rng.uniform(0.2, 2, size=(tokens, lanes, 1))
        q, k, v = (x.astype(np.float32).astype(np.float64) for x in (rotate(plain, theta), k, v))
        w_o = rng.normal(size=(12, heads * width)).astype(np.float32).astype(np.float64)
        layers.append(Layer(q, plain, k, v, w_o, theta, width**-0.5, index))
    return layers


class Life:
    """One sequence over `layers` under `policy`: feed it tokens, look at what its lanes hold."""

    def __init__(self, layers, policy, prompt, token_ids=None, seed=0, block_size=16):
        self.layers = layers
        first = layers[0]
        lanes, width = first.k.shape[1:]
        spec = KVSpec(tuple(LayerKV(lanes, width, first.v.shape[2]) for _ in layers), block_size, "fp32")
        self.cache = KVCache(spec, 16 * SLAB_BYTES, 3, torch.float32)
        self.facts = ModelFacts(
            num_query_heads=first.q.shape[1],
            query_scale=first.scale,
            inverse_frequencies=[None if x.theta is None else torch.from_numpy(x.theta) for x in layers],
            output_weight=lambda layer: torch.from_numpy(layers[layer].w_o).float(),
            token_kinds=lambda: KINDS,
            replay_instruction=lambda hint: [5, *hint],
        )
        self.token_ids = list(token_ids if token_ids is not None else range(len(first.k)))
        self.prompt = prompt
        self.row = self.cache.lanes.open()
        self.policy = Policy.parse(policy)
        assert not self.policy.refusals(spec, prompt, self.facts)
        self.eviction = Eviction(self.policy, self.cache, self.facts, self.token_ids, prompt, seed)

    def feed(self, start, end):
        """Process tokens start .. end - 1 and let the policy act where it is due."""
        lanes = self.cache.lanes
        assert lanes.extend(self.row, end - start)
        for index, layer in enumerate(self.layers):
            self.put(index, self.row, layer.k[start:end], layer.v[start:end])
        first = self.eviction.first_watched(start, end - start)
        if first is not None:
            queries = np.stack([layer.q[start + first : end] for layer in self.layers])
            self.eviction.observe(self.row, torch.from_numpy(queries).float())

    def put(self, index, row, k, v):
        """Write keys and values [n, G, D] into the newest slots of a layer."""
        self.cache.append(index, row, torch.from_numpy(k).float(), torch.from_numpy(v).float())

    def act(self):
        """Let the policy act if it is due."""
        if self.eviction.due(self.row):
            assert self.eviction.apply(self.row)
            self.cache.check_invariants()

    def prefill(self, chunk=None):
        """Process the prompt in pieces of `chunk`, cut where the policy looks again."""
        at = 0
        while at < self.prompt:
            end = min(self.eviction.schedule.next_boundary(at), at + (chunk or self.prompt))
            self.feed(at, end)
            if end < self.prompt:
                self.act()
            at = end

    def decode(self):
        """Process the next token."""
        at = int(self.cache.lanes.seen[self.row])
        self.feed(at, at + 1)
        self.act()

    def held(self, index):
        """Return the positions that each lane of a layer holds."""
        view = self.cache.layers[index]
        return [self.cache.lanes.positions_of(self.row, view.first + g).tolist() for g in range(view.num_lanes)]
