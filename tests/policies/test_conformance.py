"""What must hold for every method in the registry; a method that is registered is tested here from then on."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.small_engine import GEMMA, LLAMA, prompt_of, run, small_engine
from harness.tiny_engine import greedy
from kvloom.models.eager import EagerModel
from kvloom.policies import plugins
from kvloom.policies.budgets import BUDGETS
from kvloom.policies.policy import Policy
from kvloom.policies.reading import read_policy
from kvloom.policies.scorer import RULES, Selector
from kvloom.spec.method import METHODS
from policies.brute_force import hash_number
from policies.watched import Shadow

plugins.load_all()
BUDGET = 24
LOSSLESS = ["", *(name for name in BUDGETS if name != "threshold")]
"""Budgets that evict nothing where they hold everything; under a threshold the value of a score decides."""

SPECIAL = {"window": "size=24", "streaming": "sinks=4,window=20", "fastgen": "recovery=0.6", "snapkv": "window=8",
           "scissorhands": "window=12", "kvzip": "chunk=40", "knorm": "skip_layers=1", "expected": "horizon=32",
           "duo": "pattern={pattern},sinks=2,window=12"}  # fmt: skip


@pytest.fixture(scope="session")
def pattern(tmp_path_factory):
    """Return the path of a pattern for the small Llama."""
    path = tmp_path_factory.mktemp("heads") / "pattern.json"
    path.write_text(json.dumps([[1, 0], [0, 1], [0, 0]]))
    return str(path)


def policy_of(name, pattern, budget=BUDGET):
    """Return a policy string for a method, with a budget where it takes one."""
    args = [f"budget={budget}"] if METHODS.get(name).budgeted else []
    if name in SPECIAL:
        args.append(SPECIAL[name].format(pattern=pattern))
    return f"{name}({','.join(args)})"


def survivors(engine, request):
    """Return the positions of every lane of the first sequence of a request that runs."""
    row, lanes = request.sequences[0].row, engine.cache.lanes
    return [lanes.positions_of(row, lane).tolist() for lane in range(lanes.spec.num_lanes)]


def after_prompt(policy, prompt, *, chunk=2048, before=None, decoder=LLAMA, **options):
    """Return what every lane holds when the first token is out, and how many prompt tokens came from a prefix."""
    engine = small_engine(decoder, max_num_batched_tokens=chunk, **options)
    if before is not None:
        run(engine, [engine.add(before, greedy(2))])
    request = engine.add(prompt, greedy(3), kv_policy=read_policy(policy))
    while not request.sequences[0].num_output_tokens:
        engine.step()
    found = survivors(engine, request)
    cached = request.sequences[0].num_cached_tokens
    engine.abort(request.request_id)
    engine.cache.check_invariants()
    assert engine.cache.bytes_in_use == 0
    return found, cached


@pytest.mark.parametrize("name", list(RULES))
def test_a_method_keeps_its_budget_and_what_it_protects_and_frees_the_rest_for_others(name, pattern):
    backend = Shadow()
    engine = small_engine(model=EagerModel(LLAMA, backend), prefix=False, block_size=16)
    backend.watch(engine.cache)
    policy = Policy.parse(policy_of(name, pattern))
    request = engine.add(prompt_of(70), greedy(6), kv_policy=read_policy(policy_of(name, pattern)))
    protected = {}
    choose = request.sequences[0].eviction.choice.make

    def watched(row):
        eviction = request.sequences[0].eviction
        for layer in eviction.layers:
            context = eviction.contexts.of_layer(layer, row)
            first = engine.cache.layers[layer].first
            if not isinstance(policy.rule, Selector):
                marks = policy.rule.protected(context) & context.valid
                for g in range(context.num_lanes):
                    protected[first + g] = context.positions[g][marks[g]].tolist()
        return choose(row)

    request.sequences[0].eviction.choice.make = watched
    while request.sequences[0].num_output_tokens == 0:
        engine.step()
    lanes, row = engine.cache.lanes, request.sequences[0].row
    held = survivors(engine, request)
    acted = [g for layer in request.sequences[0].eviction.layers for g in
             range(engine.cache.layers[layer].first, engine.cache.layers[layer].first + 2)]  # fmt: skip
    if METHODS.get(name).budgeted or name in ("window", "streaming"):
        assert sum(len(held[lane]) for lane in acted) == BUDGET * len(acted)
    for lane, positions in protected.items():
        assert set(positions) <= set(held[lane])
    assert backend.compactions and backend.freed
    freed = set(backend.freed)
    others = [engine.add(prompt_of(90, seed=i), greedy(4)) for i in range(1, 3)]
    engine.step()
    taken = {a for other in others for a in lanes.table[other.sequences[0].row].ravel().tolist() if a >= 0}
    assert taken & freed, "what was freed is written by others"
    run(engine, [request, *others], engine.cache.check_invariants)
    assert backend.checked > 100
    assert engine.cache.arena.used_bytes == 0
    assert lanes.num_free == len(lanes.seen) and row is not None


@pytest.mark.parametrize("name", list(RULES))
def test_what_is_kept_depends_neither_on_the_chunk_size_nor_on_a_cached_prefix(name, pattern):
    prompt = prompt_of(600)
    policy = policy_of(name, pattern, budget=100)
    if METHODS.get(name).triggers == ("chunk", "step"):
        policy += "+chunk(tokens=256)+step"
    whole, _ = after_prompt(policy, prompt, prefix=False)
    for chunk in (64, 512):
        assert after_prompt(policy, prompt, chunk=chunk, prefix=False)[0] == whole
    hit, cached = after_prompt(policy, prompt, before=prompt[:592])
    assert hit == whole
    needs = Policy.parse(policy).needs
    if not needs.key_mass and not needs.query_moments:
        assert cached > 0, "a method that can use the prefix does"


@pytest.mark.parametrize("name", [n for n, rule in RULES.items() if METHODS.get(n).budgeted])
@settings(max_examples=2)
@given(length=st.integers(30, 60), seed=st.integers(0, 99), budget=st.sampled_from(LOSSLESS))
def test_a_budget_that_holds_everything_changes_no_bit(name, length, seed, budget):
    prompt = prompt_of(length, seed)
    engine = small_engine()
    free = engine.add(prompt, greedy(4, logprobs=3))
    policy = f"{name}(budget=100)" + (f"+{budget}" if budget else "")
    bound = engine.add(prompt, greedy(4, logprobs=3), kv_policy=read_policy(policy))
    run(engine, [free, bound])
    assert free.sequences[0].token_ids == bound.sequences[0].token_ids
    assert free.sequences[0].logprobs == bound.sequences[0].logprobs
    assert engine.kv_usage(bound).evicted_tokens == 0


def test_a_threshold_evicts_what_scores_below_it_even_where_the_budget_holds_everything():
    prompt = prompt_of(60)
    kept, _ = after_prompt("random(budget=100)+threshold(above=0.6)", prompt, prefix=False)
    lanes = [(layer, g) for layer in range(LLAMA.config.num_layers) for g in range(2)]
    expected = [[p for p in range(60) if hash_number(p, g, layer, 0) > 0.6] for layer, g in lanes]
    assert kept == expected
    assert all(0 < len(positions) < 60 for positions in expected)


@pytest.mark.parametrize("name", [n for n in RULES if n != "duo"])
def test_windowed_layers_are_left_to_their_window(name, pattern):
    prompt = prompt_of(90)
    held, _ = after_prompt(policy_of(name, pattern).replace("skip_layers=1", "skip_layers=0"), prompt, decoder=GEMMA)
    for lane in (0, 2):
        assert held[lane] == list(range(90 - 20, 90)) or held[lane][-19:] == list(range(71, 90))
    if METHODS.get(name).budgeted:
        assert len(held[1]) + len(held[3]) == 2 * BUDGET


@settings(max_examples=8)
@given(
    names=st.lists(st.sampled_from(sorted(set(RULES) - {"duo"})), min_size=2, max_size=4),
    lengths=st.lists(st.integers(20, 120), min_size=4, max_size=4),
    chunk=st.sampled_from([48, 2048]),
)
def test_requests_with_different_policies_in_one_batch_answer_as_they_do_alone(names, lengths, chunk):
    requests = [(prompt_of(n, seed=n), policy_of(name, "")) for name, n in zip(names, lengths, strict=False)]
    requests.append((prompt_of(lengths[0], seed=lengths[0]), "full"))
    engine = small_engine(max_num_batched_tokens=chunk, prefix=False)
    added = [engine.add(p, greedy(5), kv_policy=read_policy(k)) for p, k in requests]
    together = run(engine, added, engine.cache.check_invariants)
    for (prompt, policy), tokens in zip(requests, together, strict=True):
        alone = small_engine(prefix=False)
        assert run(alone, [alone.add(prompt, greedy(5), kv_policy=read_policy(policy))]) == [tokens]


@pytest.mark.parametrize("policy", ["keydiff(budget=64)+chunk(tokens=128)", "tova(budget=64)+chunk(tokens=128)",
                                    "knorm(budget=64,skip_layers=0)+chunk(tokens=128)"])  # fmt: skip
def test_a_policy_that_evicts_inside_the_prompt_takes_no_prefix_from_beyond_its_first_eviction(policy):
    prompt = prompt_of(600)
    alone, _ = after_prompt(policy, prompt, prefix=False)
    hit, cached = after_prompt(policy, prompt, before=prompt[:592])
    assert hit == alone
    assert cached == 112, "the last whole block before position 128"
