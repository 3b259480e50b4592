"""What every method keeps, on the lanes of a real cache, equals its formula written down once more in float64."""

import json

import numpy as np
import pytest
import torch

from kvloom.policies import plugins
from kvloom.policies.scorer import RULES
from policies import brute_force
from policies.lifelike import KINDS, Life, random_layers, rotate

PROMPT, STEPS, BUDGET = 41, 6, 18
PATTERN = [[1.0, 0.2, 0.6, 0.1], [0.0, 0.9, 0.0, 0.5]]

#         method, arguments as spelled, the same for the formula, options of `play`
CASES = [
    ("window", f"size={BUDGET}", {"sinks": 0}, {}),
    ("streaming", f"sinks=3,window={BUDGET - 3}", {"sinks": 3}, {}),
    ("h2o", f"budget={BUDGET},recent=0.4", {"recent": 0.4}, {}),
    ("tova", f"budget={BUDGET}", {}, {}),
    ("scissorhands", f"budget={BUDGET},window=9,recent=4", {"window": 9, "recent": 4}, {"mass_window": 9}),
    ("snapkv", f"budget={BUDGET},window=6", {"window": 6}, {"steps": False}),
    ("snapkv", f"budget={BUDGET},window=6,kernel=3,pooling=max", {"window": 6, "kernel": 3, "pooling": "max"},
     {"steps": False}),
    ("knorm", f"budget={BUDGET},skip_layers=0", {}, {"steps": False}),
    ("keydiff", f"budget={BUDGET}", {}, {"steps": False}),
    ("expected", f"budget={BUDGET},horizon=20,sinks=3,eps=0.01", {"horizon": 20, "sinks": 3, "eps": 0.01},
     {"steps": False}),
    ("random", f"budget={BUDGET},sinks=2,seed=5", {"sinks": 2, "seed": 5}, {"steps": False}),
    ("fastgen", "recovery=0.75", {"recovery": 0.75}, {}),
    ("fastgen", "recovery=0.5,recent=0.2,frequent=0.2", {"recovery": 0.5, "recent": 0.2, "frequent": 0.2}, {}),
    ("duo", "pattern={pattern},sinks=2,window=7", {"sinks": 2, "window": 7}, {}),
]  # fmt: skip
REFINED = [
    ("h2o", f"budget={BUDGET}", {}, "vatp", "sinks=2", {"sinks": 2}, {}),
    ("snapkv", f"budget={BUDGET},window=5", {"window": 5}, "vatp", "sinks=3", {"sinks": 3}, {"steps": False}),
    ("snapkv", f"budget={BUDGET},window=5", {"window": 5}, "critical", "eps=0.01", {"eps": 0.01}, {"steps": False}),
    ("tova", f"budget={BUDGET}", {}, "critical", "eps=0.0001", {"eps": 1e-4}, {"steps": False}),
    ("h2o", f"budget={BUDGET}", {}, "critical", "eps=0.02", {"eps": 0.02}, {}),
    ("scissorhands", f"budget={BUDGET},window=9,recent=4", {"window": 9, "recent": 4}, "critical", "eps=0.02",
     {"eps": 0.02}, {"mass_window": 9}),
]
SHAPES = [(4, 1), (2, 3), (1, 8)]
"""KV heads and query heads to each."""

IDS = [0, *np.random.default_rng(3).integers(0, 30, PROMPT + STEPS - 1).tolist()]


def compare(layers, prompt, policy, name, args, options, chunk=None):
    """Play `policy` in the cache and by the formula; every lane must hold the same positions at every moment."""
    for layer in layers:
        layer.special = np.array([t in KINDS.special for t in IDS])
        layer.punctuation = np.array([t in KINDS.punctuation for t in IDS])
    budget = options.pop("budget", BUDGET)
    told = [brute_force.play(layer, name, args, budget, prompt, **options) for layer in layers]
    life = Life(layers, policy, prompt, IDS)
    life.prefill(chunk)
    life.act()
    for moment in range(len(told[0])):
        if moment:
            life.decode()
        for index in range(len(layers)):
            assert life.held(index) == told[index][moment], f"layer {index}, {moment} tokens after the prompt"


@pytest.mark.parametrize("lanes, group", SHAPES)
@pytest.mark.parametrize("name, spelled, args, options", CASES)
def test_a_method_keeps_what_its_formula_says(name, spelled, args, options, lanes, group, tmp_path):
    layers = random_layers(lanes, group, PROMPT + STEPS)
    if name == "duo":
        pattern = [row[:lanes] for row in PATTERN]
        (tmp_path / "heads.json").write_text(json.dumps(pattern))
        spelled = spelled.format(pattern=tmp_path / "heads.json")
        args = {**args, "retrieval": [[value >= 0.5 for value in row] for row in pattern]}
    extra = "+chunk(tokens=100)+step" if name in ("window", "streaming", "duo") else ""
    compare(layers, PROMPT, f"{name}({spelled}){extra}", name, args, dict(options))


@pytest.mark.parametrize("lanes, group", SHAPES)
@pytest.mark.parametrize("name, spelled, args, refine, refined, refine_args, options", REFINED)
def test_a_refined_method_keeps_what_both_formulas_say(
    name, spelled, args, refine, refined, refine_args, options, lanes, group
):
    layers = random_layers(lanes, group, PROMPT + STEPS, seed=1)
    options = {**options, "refine": refine, "refine_args": refine_args}
    compare(layers, PROMPT, f"{name}({spelled})+{refine}({refined})", name, args, options)


@pytest.mark.parametrize("lanes, group", SHAPES)
@pytest.mark.parametrize("normalised", [False, True])
def test_kvzip_scores_what_a_replay_looks_up(lanes, group, normalised):
    layers = random_layers(lanes, group, PROMPT, seed=2)
    spelled = f"kvzip(budget={BUDGET},chunk=17,sinks=3,normalised={str(normalised).lower()})+uniform"
    life = Life(layers, spelled, PROMPT)
    life.prefill()
    scores = life.eviction.begin_replay(life.row)
    rng = np.random.default_rng(9)
    fed = [[] for _ in layers]
    norms = []
    for now in life.eviction.replay_passes():
        count = len(now.token_ids)
        assert now.token_ids[-(now.last - now.first) :] == tuple(life.token_ids[now.first : now.last])
        fork = life.cache.lanes.fork(life.row)
        norms.append(rng.uniform(1, 3, count).astype(np.float32).astype(np.float64))
        extra = [random_layers(lanes, group, count, count=1, seed=100 + now.first + i)[0] for i in range(len(layers))]
        for start in range(0, count, 10):  # in pieces, as the engine does it
            end = min(count, start + 10)
            assert life.cache.lanes.extend(fork, end - start)
            for index, x in enumerate(extra):
                life.put(index, fork, x.k[start:end], x.v[start:end])
                seen = torch.from_numpy(norms[-1][start:end]).float() if normalised else None
                scores.observe(index, fork, now, torch.from_numpy(x.q[start:end]).float(), seen)
        for index, x in enumerate(extra):
            fed[index].append((now.first, now.last, x.q, x.k))
        life.cache.lanes.close(fork)
    life.eviction.record.replay_scores = dict(scores.best)
    life.act()
    for index, layer in enumerate(layers):
        layer.replay = brute_force.replay_scores(layer, fed[index], 3, PROMPT, norms if normalised else None)
        np.testing.assert_allclose(scores.best[index], layer.replay, rtol=2e-5, atol=1e-7)
        expected = brute_force.play(layer, "kvzip", {"sinks": 3}, BUDGET, PROMPT, steps=False)[0]
        assert life.held(index) == expected


@pytest.mark.parametrize("budget, spans", [("adaptive(floor=0.3)", False), ("global(floor=0.1)", True)])
def test_lanes_that_share_a_budget_get_the_lengths_that_the_best_scores_give(budget, spans):
    floor = float(budget.partition("=")[2].rstrip(")"))
    layers = random_layers(2, 3, PROMPT, seed=4)
    life = Life(layers, f"snapkv(budget={BUDGET},window=5)+{budget}", PROMPT)
    life.prefill()
    life.act()
    lane = brute_force.Lane(list(range(PROMPT)))
    found = [[brute_force.snapkv(x, g, lane, PROMPT, BUDGET, PROMPT, window=5) for g in range(2)] for x in layers]
    rows = [part for layer in found for part in layer]
    groups = [rows] if spans else found
    lengths = []
    for group in groups:
        lengths += brute_force.shared_lengths([s for s, _ in group], [p for _, p in group], BUDGET, floor)
    held = [positions for index in range(2) for positions in life.held(index)]
    assert [len(positions) for positions in held] == lengths
    assert len(set(lengths)) > 1
    for (scores, protected), length, positions in zip(rows, lengths, held, strict=True):
        assert positions == brute_force.best(scores, lane.held, protected, length)


def test_a_pyramid_over_a_short_prompt_is_even_as_in_the_code_of_its_authors():
    # the authors' code: `elif q_len < (max_capacity_prompt - window_size) * 2`, then every layer keeps the same
    for budget, lengths in ((26, [26, 26]), (25, [41, 9])):  # 41 tokens against 2 x (26 - 5) and 2 x (25 - 5)
        life = Life(random_layers(2, 3, PROMPT, seed=4), f"snapkv(budget={budget},window=5)+pyramid", PROMPT)
        life.prefill()
        life.act()
        assert [{len(lane) for lane in life.held(index)} for index in range(2)] == [{n} for n in lengths]


def test_shares_of_a_pyramid_stay_as_the_prompt_made_them_while_tokens_are_generated():
    life = Life(random_layers(2, 3, PROMPT + STEPS, seed=4), "tova(budget=18)+pyramid(beta=2)", PROMPT)
    life.prefill()
    life.act()
    found = []
    for _ in range(STEPS):
        life.decode()
        found.append([len(life.held(index)[0]) for index in range(2)])
    assert found == [[27, 9]] * STEPS  # no lane holds 2 x 18 tokens, and yet the prompt had them


def test_every_scorer_of_this_package_has_a_formula_here():
    plugins.load_all()
    own = {name for name, make in RULES.items() if make.__module__.startswith("kvloom.")}
    assert own == {*brute_force.SCORES, *brute_force.SELECTORS}


# ---- merging -----------------------------------------------------------------------------------------------------


def survivors(life, index, g):
    """Return keys, values and log counts of a lane by position."""
    lane = life.cache.layers[index].first + g
    k, v = life.cache.read_lane(life.row, lane)
    counts = life.cache.read_log_counts(index, life.row)
    held = life.held(index)[g]
    logs = [0.0] * len(held) if counts is None else counts[g, -len(held) :].tolist()
    return tuple(dict(zip(held, values, strict=True)) for values in (k.numpy(), v.numpy(), logs))


@pytest.mark.parametrize("action", ["cam(window=4)", "d2o(decay=0.3,mass=true)", "kvmerger(similarity=0.2,mass=true)"])
def test_survivors_hold_what_the_merging_formula_says(action):
    layers = random_layers(2, 3, PROMPT, seed=5)
    life = Life(layers, f"h2o(budget={BUDGET})+{action}", PROMPT, seed=77)
    life.prefill()
    life.act()
    merged = 0
    for index, layer in enumerate(layers):
        for g in range(2):
            kept = life.held(index)[g]
            gone = [j for j in range(PROMPT) if j not in kept]
            lane = brute_force.Lane(list(range(PROMPT)))
            for query in range(PROMPT):
                brute_force.watch(layer, g, lane, query, True)
            k, v = layer.k[:, g], layer.v[:, g]
            counts = dict.fromkeys(kept, 1)
            if action.startswith("cam"):
                def draw(j, g=g, index=index):
                    return brute_force.hash_number(j, g, index, 77)

                keys, values = brute_force.cam(k, v, kept, gone, lane.mass, draw, 4)
            elif action.startswith("d2o"):
                keys, values, counts, _ = brute_force.d2o(k, v, kept, gone, None, 0.3)
            else:
                keys, values, counts = brute_force.kvmerger(k, v, kept, gone, lane.mass, 0.2)
            own_k, own_v, logs = survivors(life, index, g)
            for j in kept:
                np.testing.assert_allclose(own_k[j], keys[j], rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(own_v[j], values[j], rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(logs[j], np.log(counts[j]), atol=1e-5)
                merged += not np.allclose(own_v[j], v[j])
    assert merged > 5


def test_the_threshold_of_d2o_moves_with_every_eviction_and_counts_add_up():
    layers = random_layers(1, 2, PROMPT + STEPS, count=1, seed=6)
    life = Life(layers, f"streaming(sinks=2,window={BUDGET - 2})+prefill+step+d2o(decay=0.25,mass=true)", PROMPT)
    life.prefill()
    life.act()
    k, v = layers[0].k[:, 0], layers[0].v[:, 0]
    kept = life.held(0)[0]
    gone = [j for j in range(PROMPT) if j not in kept]
    keys, values, counts, threshold = brute_force.d2o(k, v, kept, gone, None, 0.25)
    for at in range(PROMPT, PROMPT + STEPS):
        life.decode()
        now = life.held(0)[0]
        keys[at], values[at], counts[at] = k[at], v[at], 1
        gone = [j for j in keys if j not in now]
        keys, values, more, threshold = brute_force.d2o(keys, values, now, gone, threshold, 0.25)
        for j in now:
            if more[j] > 1:
                assert len(gone) == 1
                counts[j] += counts[gone[0]]
        counts = {j: counts[j] for j in now}
    own_k, own_v, logs = survivors(life, 0, 0)
    for j in now:
        np.testing.assert_allclose(own_k[j], keys[j], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(own_v[j], values[j], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.exp(logs[j]), counts[j], rtol=1e-4)


def test_the_formulas_rotate_as_the_lanes_do():
    theta = np.array([1.0, 0.01])
    x = np.random.default_rng(0).normal(size=(5, 1, 4))
    np.testing.assert_allclose(rotate(x, theta)[3, 0], brute_force.rope_matrix(theta, 3) @ x[3, 0])
