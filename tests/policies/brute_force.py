"""Every method once more, in float64 numpy and straight from its formula: loops over lanes, queries and keys.

Nothing here uses the package. A `Layer` holds all queries, keys and values of one layer of one sequence; `Lane` is the
kept part of one KV head, as a list of positions. `play` processes a prompt and then tokens one by one, and evicts where
the method says so.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np


@dataclass
class Layer:
    """q [n, H, D] rotated, plain [n, H, D] unrotated, k [n, G, D] rotated, v [n, G, Dv], w_o [hidden, H * Dv]."""

    q: np.ndarray
    plain: np.ndarray
    k: np.ndarray
    v: np.ndarray
    w_o: np.ndarray
    theta: np.ndarray | None
    scale: float
    index: int = 0
    replay: np.ndarray | None = None
    special: np.ndarray | None = None
    punctuation: np.ndarray | None = None

    @property
    def group(self):
        return self.q.shape[1] // self.k.shape[1]

    def heads(self, lane):
        return range(lane * self.group, (lane + 1) * self.group)


@dataclass
class Lane:
    """Positions held, in order, and the attention mass that each has had."""

    held: list
    mass: dict = field(default_factory=dict)
    profile: int | None = None


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def weights(layer, lane, head, query, held):
    """Return softmax weights of one query of one head over the positions `held`."""
    scores = np.array([layer.q[query, head] @ layer.k[j, lane] for j in held]) * layer.scale
    return softmax(scores)


def group_weights(layer, lane, query, held):
    return np.mean([weights(layer, lane, head, query, held) for head in layer.heads(lane)], axis=0)


def best(scores, held, protected, count):
    """Return the `count` positions that stay: protected first, then by score, equal ones by position."""
    order = sorted(range(len(held)), key=lambda i: (held[i] not in protected, -scores[i], held[i]))
    return sorted(held[i] for i in order[:count])


def hash_number(position, lane, layer, seed):
    """Return the finaliser of splitmix64 in 62 bits, on 64-bit two's complement integers, over 2**62."""

    def wrap(x):
        x &= (1 << 64) - 1
        return x - (1 << 64) if x >> 63 else x

    mask = 0x3FFFFFFFFFFFFFFF
    x = wrap(position * 0x9E3779B1 + lane * 0x85EBCA77 + layer * 0xC2B2AE3D + seed * 0x27D4EB2F) & mask
    for shift, factor in ((30, 0x1B03738712FAD5C9), (27, 0x14D049BB133111EB)):
        x = wrap((x ^ (x >> shift)) * factor) & mask
    return (x ^ (x >> 31)) / 2.0**62


# ---- scores: (scores by held position, protected positions) for one lane after `seen` tokens ---------------------


def h2o(layer, g, lane, seen, budget, prompt, recent=0.5):
    return [lane.mass[j] / seen for j in lane.held], set(range(seen - int(recent * budget), seen))


def scissorhands(layer, g, lane, seen, budget, prompt, window=400, recent=10):
    queries = seen - max(0, prompt - window)
    return [lane.mass[j] / queries for j in lane.held], set(range(seen - recent, seen))


def tova(layer, g, lane, seen, budget, prompt):
    lanes = range(layer.k.shape[1])
    return np.mean([weights(layer, n, h, seen - 1, lane.held) for n in lanes for h in layer.heads(n)], axis=0), set()


def snapkv(layer, g, lane, seen, budget, prompt, window=32, kernel=5, pooling="avg"):
    """Follow the authors' code: softmax over all keys, scores of the prefix only (`[..., :-window]`), then pooling.

    As in kvpress, weights are a mean over the window and over the query group; the window's own score is never needed.
    """
    prefix = [j for j in lane.held if j < seen - window]
    total = np.zeros(len(prefix))
    for head in layer.heads(g):
        mass = np.zeros(len(prefix))
        for query in range(seen - window, seen):
            past = [j for j in lane.held if j <= query]
            mass += weights(layer, g, head, query, past)[: len(prefix)] / window
        half = kernel // 2
        around = np.concatenate((np.zeros(half), mass, np.zeros(half)))
        windows = [around[i : i + kernel] for i in range(len(mass))]
        total += [w.sum() / kernel if pooling == "avg" else w.max() for w in windows]
    newest = [total.max() + 1] * (len(lane.held) - len(prefix))
    return [*(total / layer.group), *newest], set(range(seen - window, seen))


def knorm(layer, g, lane, seen, budget, prompt):
    return [-np.sqrt((layer.k[j, g] ** 2).sum()) for j in lane.held], set()


def keydiff(layer, g, lane, seen, budget, prompt):
    units = [layer.k[j, g] / np.linalg.norm(layer.k[j, g]) for j in lane.held]
    anchor = np.mean(units, axis=0)
    return [-(u @ anchor) / np.linalg.norm(anchor) for u in units], set()


def rope_matrix(theta, position):
    half = len(theta)
    matrix = np.zeros((2 * half, 2 * half))
    for i, angle in enumerate(position * theta):
        matrix[i, i] = matrix[i + half, i + half] = np.cos(angle)
        matrix[i, i + half], matrix[i + half, i] = -np.sin(angle), np.sin(angle)
    return matrix


def expected(layer, g, lane, seen, budget, prompt, horizon=512, sinks=4, eps=0.0):
    turn = np.eye(layer.q.shape[2])
    if layer.theta is not None:
        turn = np.mean([rope_matrix(layer.theta, p) for p in range(seen, seen + horizon)], axis=0)
    total = np.zeros(len(lane.held) - sinks)
    for head in layer.heads(g):
        queries = layer.plain[sinks:prompt, head]
        mu = turn @ queries.mean(0)
        sigma = turn @ np.cov(queries.T, bias=True) @ turn.T
        keys = [layer.k[j, g] for j in lane.held if j >= sinks]
        z = [k @ mu * layer.scale + k @ sigma @ k * layer.scale**2 / 2 for k in keys]
        total += softmax(np.array(z)) / layer.group
    norms = [np.linalg.norm(layer.v[j, g]) for j in lane.held]
    return (np.concatenate((np.zeros(sinks), total)) + eps) * norms, set(range(sinks))


def kvzip(layer, g, lane, seen, budget, prompt, sinks=4):
    return layer.replay[g, lane.held], set(range(sinks))


def streaming(layer, g, lane, seen, budget, prompt, sinks=4, window=0):
    return list(lane.held), set(range(sinks))


def random(layer, g, lane, seen, budget, prompt, sinks=0, seed=0):
    return [hash_number(j, g, layer.index, seed) for j in lane.held], set(range(sinks))


SCORES = {
    "h2o": h2o, "scissorhands": scissorhands, "tova": tova, "snapkv": snapkv, "knorm": knorm, "keydiff": keydiff,
    "expected": expected, "kvzip": kvzip, "streaming": streaming, "window": streaming, "random": random,
}  # fmt: skip


# ---- selectors: positions that stay in one lane ------------------------------------------------------------------


def fastgen(layer, g, lane, seen, prompt, recovery=0.95, recent=0.3, frequent=0.3):
    held = lane.held
    special = {j for j in held if layer.special[j] or j == 0}
    punctuation = special | {j for j in held if layer.punctuation[j]}
    top = sorted(held, key=lambda j: (-lane.mass[j], j))[: int(frequent * prompt)]
    often = punctuation | set(top)
    local = often | set(range(seen - int(recent * prompt), seen))
    if lane.profile is None:  # from the whole map of the prompt
        recovered = []
        for kept, reach in ((special, 0), (punctuation, 0), (often, 0), (often, int(recent * prompt))):
            shares = []
            for i in range(prompt):
                a = group_weights(layer, g, i, range(i + 1))
                shares.append(sum(a[j] for j in range(i + 1) if j in kept or i - j < reach))
            recovered.append(np.mean(shares) >= recovery)
        lane.profile = recovered.index(True) if any(recovered) else 4
    return sorted([special, punctuation, often, local & set(held), set(held)][lane.profile])


def duo(layer, g, lane, seen, prompt, retrieval=(), sinks=4, window=256):
    if retrieval[layer.index][g]:
        return list(lane.held)
    return [j for j in lane.held if j < sinks or j >= seen - window]


SELECTORS = {"fastgen": fastgen, "duo": duo}


# ---- refinements -------------------------------------------------------------------------------------------------


def vatp(layer, g, held, scores, protected, sinks=20):
    return [s * np.abs(layer.v[j, g]).sum() for s, j in zip(scores, held, strict=True)], protected | set(range(sinks))


def critical(layer, g, held, scores, protected, count, eps=1e-4):
    """Return the positions that both stages keep; `eps` is added to mean attention weights (kvpress, CriticalKV)."""
    first = set(best(scores, held, protected, count // 2))
    width = layer.v.shape[2]
    norms = []
    for j in held:
        own = [layer.w_o[:, h * width : (h + 1) * width] @ layer.v[j, g] for h in layer.heads(g)]
        norms.append(np.mean([np.abs(o).sum() for o in own]))
    return best([(s + eps) * n for s, n in zip(scores, norms, strict=True)], held, protected | first, count)


# ---- replay ------------------------------------------------------------------------------------------------------


def replay_scores(layer, passes, sinks, context, input_norms=None):
    """Return KVzip's scores [G, context]; `passes` are (first, last, q [m, H, D], k [m, G, D]) of what is fed again."""
    found = np.zeros((layer.k.shape[1], context))
    width = layer.v.shape[2]
    for number, (first, last, q, k) in enumerate(passes):
        head_keys = min(sinks, first)
        for g in range(layer.k.shape[1]):
            for head in layer.heads(g):
                for i in range(len(q)):
                    keys = [*layer.k[:head_keys, g], *layer.k[first:last, g], *k[: i + 1, g]]
                    a = softmax(np.array([q[i, head] @ key for key in keys]) * layer.scale)
                    a = a[head_keys : head_keys + last - first]
                    if input_norms is not None:
                        out = layer.v[first:last, g] @ layer.w_o[:, head * width : (head + 1) * width].T
                        a = a * np.linalg.norm(out, axis=1) / input_norms[number][i]
                    found[g, first:last] = np.maximum(found[g, first:last], a)
    return found


# ---- a whole life ------------------------------------------------------------------------------------------------


def watch(layer, g, lane, query, counts):
    """Add what `query` pays to every held position up to its own, if it counts."""
    past = [j for j in lane.held if j <= query]
    a = group_weights(layer, g, query, past)
    for j, share in zip(past, a, strict=True):
        lane.mass[j] = lane.mass.get(j, 0.0) + share * counts


def play(layer, name, args, budget, prompt, *, refine=None, refine_args=None, mass_window=None, steps=True):
    """Return what each lane holds after the prompt was evicted, and (with `steps`) at every later token."""
    lanes = [Lane(list(range(prompt))) for _ in range(layer.k.shape[1])]
    history = []
    needs_mass = name in ("h2o", "scissorhands", "fastgen")
    for seen in range(prompt, len(layer.k) + 1):
        if seen > prompt and not steps:
            break
        for g, lane in enumerate(lanes):
            if seen > prompt:
                lane.held.append(seen - 1)
            if needs_mass:
                queries = range(prompt) if seen == prompt else [seen - 1]
                for query in queries:
                    watch(layer, g, lane, query, mass_window is None or query >= prompt - mass_window)
        kept = []
        for g, lane in enumerate(lanes):
            if name in SELECTORS:
                kept.append(SELECTORS[name](layer, g, lane, seen, prompt, **args))
                continue
            scores, protected = SCORES[name](layer, g, lane, seen, budget, prompt, **args)
            count = min(budget, len(lane.held))
            if refine == "vatp":
                scores, protected = vatp(layer, g, lane.held, scores, protected, **(refine_args or {}))
            if refine == "critical":
                kept.append(critical(layer, g, lane.held, scores, protected, count, **(refine_args or {})))
            else:
                kept.append(best(scores, lane.held, protected, count))
        for lane, held in zip(lanes, kept, strict=True):
            lane.held = list(held)
        history.append([list(lane.held) for lane in lanes])
    return history


# ---- budgets: lengths from scores --------------------------------------------------------------------------------


def shared_lengths(scores, protected, budget, floor):
    """Return the length of each lane: own floor and protected first, then the best of all lanes together."""
    total = min(len(scores) * budget, sum(len(s) for s in scores))
    own = int(floor * budget)
    kept = []
    for s, p in zip(scores, protected, strict=True):
        order = sorted(range(len(s)), key=lambda i: (i not in p, -s[i], i))
        kept.append(set(order[:own]) | set(p))
    rest = [(-s[i], g, i) for g, s in enumerate(scores) for i in range(len(s)) if i not in kept[g]]
    for _, g, i in sorted(rest)[: max(0, total - sum(map(len, kept)))]:
        kept[g].add(i)
    return [len(k) for k in kept]


# ---- merging -----------------------------------------------------------------------------------------------------


def cam(k, v, kept, gone, mass, draw, window):
    """Return values by kept position; `draw(j)` is the uniform number of an evicted position."""
    new = {j: v[j].copy() for j in kept}
    for i in gone:
        following = [j for j in kept if j > i][:window]
        if not following:
            continue
        mean = np.mean([mass[j] for j in following])
        chance = min(1.0, mass[i] / mean) if mean > 0 else 0.0
        if draw(i) < chance:
            for j in following:
                new[j] = new[j] + v[i] / len(following)
    return {j: k[j] for j in kept}, new


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def d2o(k, v, kept, gone, threshold, decay):
    """Return keys, values and counts by kept position, and the new threshold."""
    near = {i: max(kept, key=lambda j: (cosine(k[i], k[j]), -j)) for i in gone}
    found = {i: cosine(k[i], k[near[i]]) for i in gone}
    mean = np.mean(list(found.values()))
    threshold = mean if threshold is None else decay * threshold + (1 - decay) * mean
    keys, values, counts = {}, {}, {}
    for j in kept:
        members = [i for i in gone if near[i] == j and found[i] >= threshold]
        share = np.array([np.e, *(np.exp(found[i]) for i in members)])
        share = share / share.sum()
        keys[j] = sum(s * k[i] for s, i in zip(share, [j, *members], strict=True))
        values[j] = sum(s * v[i] for s, i in zip(share, [j, *members], strict=True))
        counts[j] = 1 + len(members)
    return keys, values, counts, threshold


def kvmerger(k, v, kept, gone, scores, similarity):
    """Return keys, values and counts by kept position."""
    order = sorted([*kept, *gone])
    runs = [[order[0]]]
    for before, j in pairwise(order):
        if cosine(k[before], k[j]) > similarity:
            runs[-1].append(j)
        else:
            runs.append([j])
    keys, values, counts = {j: k[j] for j in kept}, {j: v[j] for j in kept}, dict.fromkeys(kept, 1)
    for run in runs:
        pivots = [j for j in run if j in kept]
        members = [j for j in run if j in gone]
        if not pivots or not members:
            continue
        p = max(pivots, key=lambda j: (scores[j], -j))
        distance = {i: np.linalg.norm(k[i] - k[p]) for i in members}
        sigma = np.mean(list(distance.values())) / np.sqrt(2)
        share = [1.0, *(np.exp(-(distance[i] ** 2) / (2 * sigma**2)) for i in members)]
        keys[p] = sum(s * k[i] for s, i in zip(share, [p, *members], strict=True)) / sum(share)
        values[p] = sum(s * v[i] for s, i in zip(share, [p, *members], strict=True)) / sum(share)
        counts[p] = 1 + len(members)
    return keys, values, counts
