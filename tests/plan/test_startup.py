"""The figures that an engine logs at its start: the planner's, and correct for that engine."""

import json
import os
import subprocess
import sys

import pytest

from harness.families import VARIANTS, decoder_of, oracle_of
from harness.serving import make_model
from harness.small_engine import GEMMA, LLAMA, prompt_of, small_engine
from harness.tiny_engine import greedy
from kvloom import LLM
from kvloom.engine.startup import engine_figures
from kvloom.errors import DoesNotFitError
from kvloom.plan.memory import Memory
from kvloom.plan.question import Question
from kvloom.plan.source import find_model
from kvloom.plan.startup import ASSUMED, start_figures
from kvloom.spec.hardware import find_device
from kvloom.spec.policy import PolicySpec
from kvloom.spec.shape import model_spec
from kvloom.spec.store import SLAB_BYTES

ARENA = 2 * SLAB_BYTES


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """Folder of a tiny Llama."""
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loaded_model_is_planned_as_its_files_are(variant, tmp_path):
    decoder, planned = decoder_of(oracle_of(variant), tmp_path), find_model(str(tmp_path))
    loaded = model_spec(decoder.config, "x", "float32")
    asked = Question(planned, find_device("cpu"), 300, 20, 4, dtype="float32")
    again = Question(loaded, asked.device, 300, 20, 4, dtype="float32")
    assert again.whole_kv == asked.whole_kv
    assert Memory(again).process.activations == Memory(asked).process.activations
    assert Memory(again).process.weights.value == pytest.approx(Memory(asked).process.weights.value, rel=0.01)


@pytest.fixture(params=[None, "streaming(sinks=4,window=60)", "snapkv(budget=64)"])
def llm(request, tiny_folder):
    """An engine with an arena of two slabs."""
    return LLM(
        str(tiny_folder), dtype="float32", kv_cache_memory_bytes=ARENA, kv_policy=request.param,
        max_num_batched_tokens=64, enable_prefix_caching=False,
    )  # fmt: skip


def test_the_figures_are_those_of_the_engine(llm):
    figures, stats = engine_figures(llm), llm.stats()
    assert figures["kv_cache_bytes"] == stats["kv_cache_bytes"] == ARENA
    assert figures["weight_bytes"] == stats["weight_bytes"]
    ((size, count),) = figures["kv_blocks"].items()
    assert int(size) * count <= ARENA < int(size) * count + 2 * int(size)
    parts = ("weight_bytes", "tokenizer_bytes", "runtime_bytes", "activation_bytes", "kv_cache_bytes")
    assert figures["total_bytes"] >= sum(figures[part] for part in parts)
    assert set(figures["assumed"]) == set(ASSUMED) <= set(figures)


def test_as_many_requests_as_it_says_run_at_once(llm):
    length, count = next(iter(engine_figures(llm)["requests_that_fit"].items()))
    output = int(length) // 8
    engine = llm.engine
    requests = [engine.add([t % 90 for t in prompt_of(int(length) - output, seed=i)], greedy(output))
                for i in range(min(count, 4))]  # fmt: skip
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, len(engine.scheduler.running))
    assert most == len(requests)
    assert engine.scheduler.num_preemptions == 0


def test_a_server_says_it_in_one_line_as_it_starts(tiny_folder):
    command = [sys.executable, "-m", "kvloom", "serve", str(tiny_folder), "--port", "0", "--dtype", "float32",
               "--kv-cache-memory-bytes", "4MiB"]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as it:
        found = {}
        while found.get("message") != "model loaded":
            found = json.loads(it.stderr.readline())
        it.kill()
    assert found["kv_cache_bytes"] == 4 << 20
    assert {"weight_bytes", "total_bytes", "longest_request", "requests_that_fit", "kv_blocks"} <= set(found)


@pytest.mark.parametrize("policy", ["full", "streaming(sinks=4,window=508)", "snapkv(budget=256)"])
@pytest.mark.parametrize("decoder", [LLAMA, GEMMA])
def test_the_longest_request_that_it_names_is_admitted_and_a_block_more_is_not(decoder, policy):
    engine = small_engine(decoder, slabs=1, max_num_batched_tokens=256, max_model_len=decoder.config.max_position)
    spec = model_spec(decoder.config, "x", "float32")
    asked = Question(spec, find_device("cpu"), 1000, 100, policy=PolicySpec.parse(policy), dtype="float32", chunk=256)
    longest = start_figures(asked, SLAB_BYTES)["longest_request"]

    def check(tokens):
        output = tokens // 8
        return engine.check(prompt_of(tokens - output), greedy(output), None, asked.policy)

    assert check(longest) == longest // 8
    if longest < decoder.config.max_position:
        with pytest.raises(DoesNotFitError):
            check(longest + 32)
