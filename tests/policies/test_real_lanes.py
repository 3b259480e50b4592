"""Every scorer against its formula, on queries, keys and values that real models have computed from real words."""

import numpy as np
import pytest
import torch

from kvloom.attention.batch import AttentionBatch
from kvloom.cache.kvcache import KVCache
from kvloom.models.checkpoint import open_checkpoint
from kvloom.models.loader import load_model
from kvloom.models.model import StepWanted
from kvloom.spec.store import NATIVE_STORE, SLAB_BYTES
from policies import brute_force
from policies.brute_force import Layer
from policies.lifelike import Life

TEXT = (
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and "
    "nothing particular to interest me on shore, I thought I would sail about a little and see the watery part of the "
    "world. It is a way I have of driving off the spleen, and regulating the circulation."
)
PROMPT, BUDGET = 56, 24
CASES = [
    ("h2o", "budget=24", {}, {}),
    ("tova", "budget=24", {}, {}),
    ("scissorhands", "budget=24,window=12,recent=6", {"window": 12, "recent": 6}, {"mass_window": 12}),
    ("snapkv", "budget=24,window=8", {"window": 8}, {"steps": False}),
    ("knorm", "budget=24,skip_layers=0", {}, {"steps": False}),
    ("keydiff", "budget=24", {}, {"steps": False}),
    ("expected", "budget=24,horizon=64", {"horizon": 64}, {"steps": False}),
    ("random", "budget=24", {}, {"steps": False}),
    ("streaming", "sinks=4,window=20", {"sinks": 4}, {}),
    ("window", "size=24", {"sinks": 0}, {}),
    ("fastgen", "recovery=0.8", {"recovery": 0.8}, {}),
]


def unrotated(q, theta):
    """Return q [n, H, D] with the rotation by its positions undone."""
    angles = np.arange(len(q))[:, None] * theta[None, :]
    cos, sin = np.cos(angles)[:, None], -np.sin(angles)[:, None]
    a, b = np.split(q, 2, axis=-1)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)


def computed_layers(path, wanted, repeat=False):
    """Return the `wanted` layers of a model over the text, and the token ids; or over the prompt and its repetition."""
    checkpoint = open_checkpoint(str(path))
    ids = checkpoint.tokenizer().encode(TEXT)[: PROMPT + 4]
    if repeat:
        ids = [*ids[:PROMPT], 5, *ids[:PROMPT]]
    model = load_model(checkpoint, torch.float32, block_size=16)
    cache = KVCache(model.config.kv_spec(16, NATIVE_STORE["float32"]), 32 * SLAB_BYTES, 1, torch.float32,
                    layout=model.layout)  # fmt: skip
    row = cache.lanes.open()
    assert cache.lanes.extend(row, len(ids))
    every = np.arange(len(ids), dtype=np.int32)
    batch = AttentionBatch(np.array(ids, np.int32), every, np.array([row], np.int32), np.array([0, len(ids)], np.int32))
    output = model.step(batch, cache, StepWanted(logit_rows=every[-1:], query_rows=every))
    layers = []
    for index, layer in enumerate(wanted):
        k, v, _ = cache.read_layer(layer, row)
        q = output.queries[layer].double().numpy()
        theta = model.inverse_frequencies(layer).double().numpy()
        k, v = (x.transpose(0, 1).double().numpy() for x in (k, v))
        w_o = model.output_weight(layer).double().numpy()
        layers.append(Layer(q, unrotated(q, theta), k, v, w_o, theta, model.config.query_scale, index))
    for layer in layers:
        layer.special = np.array([t in (0, 1) for t in ids])
        layer.punctuation = np.array([t in (2, 3, 4) for t in ids])
    return layers, ids


MODELS = {"smollm2": ("smollm2_path", [0, 14, 29]), "gemma": ("gemma_path", [5, 11])}


@pytest.fixture(scope="module")
def smollm2_layers(smollm2_path):
    """Three layers of SmolLM2: three KV heads, three query heads to each."""
    return computed_layers(smollm2_path, [0, 14, 29])


@pytest.fixture(scope="module")
def gemma_layers(gemma_path):
    """Two of Gemma 3's global layers: one KV head, four query heads."""
    return computed_layers(gemma_path, [5, 11])


def compare(found, name, spelled, args, options):
    layers, ids = found
    extra = "+chunk(tokens=100)+step" if name in ("window", "streaming", "duo") else ""
    life = Life(layers, f"{name}({spelled}){extra}", PROMPT, ids)
    life.prefill(chunk=20)
    life.act()
    told = [brute_force.play(layer, name, args, BUDGET, PROMPT, **options) for layer in layers]
    for moment in range(len(told[0])):
        if moment:
            life.decode()
        for index in range(len(layers)):
            assert life.held(index) == told[index][moment]


@pytest.mark.real_model
@pytest.mark.parametrize("name, spelled, args, options", CASES)
def test_on_smollm2_a_method_keeps_what_its_formula_says(smollm2_layers, name, spelled, args, options):
    compare(smollm2_layers, name, spelled, args, options)


@pytest.mark.real_model
@pytest.mark.parametrize("name, spelled, args, options", CASES)
def test_on_global_layers_of_gemma_a_method_keeps_what_its_formula_says(gemma_layers, name, spelled, args, options):
    compare(gemma_layers, name, spelled, args, options)


@pytest.mark.real_model
@pytest.mark.parametrize("model", list(MODELS))
def test_on_real_models_kvzip_keeps_what_its_formula_says(model, request):
    path, wanted = MODELS[model]
    layers, ids = computed_layers(request.getfixturevalue(path), wanted, repeat=True)
    life = Life(layers, "kvzip(budget=24)+uniform", PROMPT, ids)
    life.prefill(chunk=20)
    scores = life.eviction.begin_replay(life.row)
    (now,) = life.eviction.replay_passes()
    assert list(now.token_ids) == ids[PROMPT:]
    fork = life.cache.lanes.fork(life.row)
    assert life.cache.lanes.extend(fork, len(now.token_ids))
    for index, layer in enumerate(layers):
        life.put(index, fork, layer.k[PROMPT:], layer.v[PROMPT:])
        scores.observe(index, fork, now, torch.from_numpy(layer.q[PROMPT:]).float(), None)
    life.cache.lanes.close(fork)
    life.eviction.record.replay_scores = dict(scores.best)
    life.act()
    for index, layer in enumerate(layers):
        passes = [(0, PROMPT, layer.q[PROMPT:], layer.k[PROMPT:])]
        layer.replay = brute_force.replay_scores(layer, passes, 4, PROMPT)
        assert life.held(index) == brute_force.play(layer, "kvzip", {}, BUDGET, PROMPT, steps=False)[0]


@pytest.mark.real_model
def test_on_smollm2_streaming_heads_of_a_pattern_keep_sinks_and_window(smollm2_layers, tmp_path):
    pattern = [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    (tmp_path / "heads.tsv").write_text("\n".join("\t".join(map(str, row)) for row in pattern))
    args = {"retrieval": pattern, "sinks": 4, "window": 16}
    compare(smollm2_layers, "duo", f"pattern={tmp_path / 'heads.tsv'},window=16", args, {})
