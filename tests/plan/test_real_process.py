"""Planned bytes against whole processes that run SmolLM2 and Gemma 3 270M: blocks of requests, and peak memory."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from kvloom.plan.memory import Memory
from kvloom.plan.question import Question
from kvloom.plan.serving import arena_bytes
from kvloom.plan.source import find_model
from kvloom.spec.footprint import held_bytes, request_footprint
from kvloom.spec.hardware import find_device
from kvloom.spec.policy import PolicySpec

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(600)]

PROGRAM = """
import json, random, sys
from kvloom import LLM, SamplingParams
from kvloom.spec.policy import PolicySpec

path, arena, users, prompt, output, dtype, quantization, policies = json.loads(sys.argv[1])
options = dict(dtype=dtype, quantization=quantization, kv_cache_memory_bytes=arena, max_num_seqs=users)
llm = LLM(path, **options, enable_prefix_caching=False)
cache = llm.engine.cache
spec = cache.spec
params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
ids = [[random.Random(user).randrange(100, 20000) for _ in range(prompt)] for user in range(users)]
found = []
for policy in policies:
    requests = [llm.engine.add(one, params, kv_policy=PolicySpec.parse(policy)) for one in ids]
    while llm.engine.has_work:
        llm.engine.step()
        for number, request in enumerate(requests):
            row = request.sequences[0].row
            if row is not None and cache.lanes.seen[row] in (prompt, prompt + output - 2):
                extents = {
                    int(address): spec.layer_block_bytes(spec.lane_layer[lane])
                    for lane in range(spec.num_lanes) for address in cache.lanes.table[row, lane] if address >= 0
                }
                held = cache.lanes.held[row].tolist()
                found.append((policy, int(cache.lanes.seen[row]), held, sum(extents.values())))
status = open("/proc/self/status").read().split()
print(json.dumps({"peak": int(status[status.index("VmHWM:") + 1]) * 1024, "found": found, "block": spec.block_size}))
"""


def run(path, asked, policies=("full",)):
    """Return what a process reports that loads the model, with an arena of the planned size, and runs all users."""
    question = [str(path), arena_bytes(asked), asked.users, asked.prompt, asked.output, asked.dtype,
                asked.quantization, list(policies)]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(question)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(params=["smollm2_path", "gemma_path"])
def path(request):
    """Path of a real model."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    "users, prompt, output, dtype, quantization",
    [(1, 2000, 24, "bfloat16", None), (4, 1500, 8, "float32", None), (1, 100, 8, "bfloat16", "int4"),
     (2, 1500, 8, "bfloat16", "int8"), (1, 100, 8, "bfloat16", "w8a8")],
)  # fmt: skip
def test_the_planned_memory_of_a_process_is_within_ten_per_cent_of_its_peak(
    path, users, prompt, output, dtype, quantization
):
    model, device = find_model(str(path)), find_device("cpu:16GiB")
    asked = Question(model, device, prompt, output, users, dtype=dtype, quantization=quantization)
    measured = run(path, asked)["peak"]
    planned = Memory(asked).total.value
    found = f"planned {planned / 2**20:.0f} MiB, measured {measured / 2**20:.0f}"
    print(f"{asked.model.name} {dtype} {quantization} x {users}: {found}")
    assert abs(planned / measured - 1) < 0.1, found


POLICIES = [
    "full", "snapkv(budget=200)", "snapkv(budget=200)+pyramid", "streaming(window=300)", "h2o(budget=150)",
    "snapkv(budget=200)+adaptive", "keydiff(budget=100)+global", "random(budget=90)+threshold(above=0.7)",
]  # fmt: skip


def test_planned_bytes_of_requests_are_those_of_the_live_tables(path):
    asked = Question(find_model(str(path)), find_device("cpu:16GiB"), 700, 20, 2)
    report = run(path, asked, POLICIES)
    kv = asked.whole_kv
    assert len(report["found"]) == len(POLICIES) * 2 * 2
    for text, seen, held, used in report["found"]:
        policy = PolicySpec.parse(text)
        planned = request_footprint(kv, policy, 700, seen - 700, asked.chunk)
        bounds = planned.settled if seen == 700 else planned.end
        assert held_bytes(kv, policy, held, seen) == used
        assert bounds.low <= used <= bounds.high
        assert used <= request_footprint(kv, policy, 700, 20, asked.chunk).peak.high
        if policy.lengths_known and not any(layer.window for layer in kv.layers):
            assert bounds.exact


def test_a_longer_context_is_planned_with_more_memory(smollm2_path):
    asked = Question(find_model(str(smollm2_path)), find_device("cpu:16GiB"), 2000, 24)
    assert Memory(asked).total.value < Memory(replace(asked, prompt=8000)).total.value
