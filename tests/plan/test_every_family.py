"""Planned bytes of every family, policy, length, batch and block size against blocks that a running engine holds."""

import random
from functools import cache
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.families import VARIANTS, decoder_of, oracle_of
from harness.small_engine import small_engine
from harness.tiny_engine import greedy
from harness.walked_bytes import walk
from kvloom.errors import UnsupportedError
from kvloom.plan.question import Question
from kvloom.plan.serving import policy_refusals
from kvloom.plan.source import find_model
from kvloom.spec.footprint import held_bytes, request_footprint
from kvloom.spec.hardware import find_device
from kvloom.spec.policy import PolicySpec

KNOWN = [
    "full", "streaming(sinks=2,window={a})", "window(size={a})", "h2o(budget={a})", "tova(budget={a})",
    "h2o(budget={a})+chunk(tokens=8)+step", "h2o(budget={a})+slack(tokens=5)", "tova(budget={a})+every(tokens=4)",
    "snapkv(budget={a},window=4)", "snapkv(budget={a},window=4)+pyramid", "random(keep=0.5)+pyramid",
    "scissorhands(budget={a},window=9,recent=3)", "knorm(budget={a},skip_layers=1)", "keydiff(keep=0.4)",
    "expected(keep=0.7,horizon=8)", "random(budget={a})", "keydiff(budget={a})+chunk(tokens=8)",
]  # fmt: skip
"""Policies under which every length follows from the prompt's."""

DEPENDENT = [
    "snapkv(budget={a},window=4)+adaptive", "snapkv(budget={a},window=4)+global", "random(budget={a})+global",
    "keydiff(budget={a})+adaptive(floor=0)", "knorm(keep=0.5,skip_layers=1)+adaptive", "h2o(budget={a})+adaptive",
    "random(budget={a})+threshold(above=0.6)", "kvzip(budget={a},chunk=16)", "fastgen(recovery=0.6)",
]  # fmt: skip
"""Policies under which the data decides."""


@cache
def model_of(variant):
    """Return the engine's decoder of a tiny model and the planner's view of the same files."""
    with TemporaryDirectory() as folder:
        decoder = decoder_of(oracle_of(variant), folder)
        return decoder, find_model(folder)


@st.composite
def questions(draw):
    """Draw (policy, prompts, output tokens, tokens of a step, tokens of a block)."""
    text = draw(st.sampled_from([*KNOWN, *DEPENDENT])).format(a=draw(st.integers(10, 40)))
    prompts = draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    step, block = draw(st.sampled_from([7, 16, 100])), draw(st.sampled_from([4, 8, 16]))
    return text, prompts, draw(st.integers(2, 14)), step, block


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(questions())
def test_planned_bytes_are_the_bytes_of_the_live_tables(variant, asked):
    text, prompts, output, chunk, block_size = asked
    decoder, model = model_of(variant)
    engine = small_engine(decoder, block_size=block_size, max_num_batched_tokens=chunk, prefix=False)
    kv = model.kv_spec(block_size, "fp32")
    assert kv == engine.cache.spec
    spec = PolicySpec.parse(text)
    live = {}
    for seed, prompt in enumerate(prompts):
        prompt = min(prompt, decoder.config.max_position - output)
        ids = [random.Random(seed).randrange(3, 120) for _ in range(prompt)]
        try:
            request = engine.add(ids, greedy(output), kv_policy=spec)
        except UnsupportedError as error:
            question = Question(model, find_device("cpu"), prompt, output, policy=spec, block_size=block_size)
            assert policy_refusals(question), f"the plan knows no reason for {error}"
            continue
        live[request.sequences[0]] = (prompt, request_footprint(kv, spec, prompt, output, chunk))
    while engine.has_work:
        engine.step()
        for sequence, (prompt, planned) in live.items():
            if sequence.row is None:
                continue
            lanes = engine.cache.lanes
            seen, used = int(lanes.seen[sequence.row]), walk(engine.cache, sequence.row)
            held = [int(n) for n in lanes.held[sequence.row]]
            assert held_bytes(kv, spec, held, seen) == used
            assert used <= planned.peak.high
            if seen >= prompt:
                assert_planned(kv, spec, prompt, seen - prompt, chunk, used)
    engine.cache.check_invariants()


def assert_planned(kv, spec, prompt, generated, chunk, used):
    """Assert that the bytes after `generated` tokens are those planned, exactly where lengths are known beforehand."""
    found = request_footprint(kv, spec, prompt, generated, chunk)
    planned = found.end if generated else found.settled
    assert planned.low <= used <= planned.high
    if spec.lengths_known and not any(layer.window for layer in kv.layers):
        assert planned.exact
