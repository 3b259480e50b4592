"""Planned bytes against the bytes in use, walked from the live tables of a running engine."""

import random

import pytest

from kvloom.plan.process import LONGEST_STRETCH
from kvloom.plan.source import find_model
from kvloom.spec.footprint import held_bytes, request_footprint
from kvloom.spec.policy import PolicySpec
from kvloom.spec.solo import solo_peak

CHUNK = 24
SHAPES = {
    "llama": {"num_key_value_heads": 2, "num_hidden_layers": 3, "head_dim": 16},
    "multi": {"num_key_value_heads": 4, "num_hidden_layers": 2, "head_dim": 16},
    "gemma3_text": {"num_key_value_heads": 1, "num_hidden_layers": 7, "head_dim": 16, "sliding_window": 8},
}


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory):
    """Folder of a tiny random model of each kind of lanes."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    shape = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
        "max_position_embeddings": 512, **SHAPES[request.param],
    }  # fmt: skip
    family = request.param if request.param == "gemma3_text" else "llama"
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **shape)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(96)}, unk_token="0"))
    words.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module", params=[4, 16])
def engine(request, folder):
    """An engine of the model in float32 without prefix sharing, in blocks of so many tokens."""
    from kvloom import LLM

    return LLM(
        str(folder),
        dtype="float32",
        block_size=request.param,
        kv_cache_memory_bytes=32 << 20,
        max_num_batched_tokens=CHUNK,
        enable_prefix_caching=False,
    ).engine


def walk(cache, row):
    """Return the bytes of the blocks of one sequence: unique addresses, each with the size of its lane's blocks."""
    extents = {}
    for lane, addresses in enumerate(cache.lanes.table[row]):
        layer = cache.spec.lane_layer[lane]
        for address in addresses:
            if address >= 0:
                assert int(address) not in extents
                extents[int(address)] = cache.spec.layer_block_bytes(layer)
    return sum(extents.values())


def trace(engine, prompt, output, policy):
    """Run one request; yield (seen, held of each lane, walked bytes) after every step while it lives."""
    from kvloom import SamplingParams

    ids = [random.Random(7).randrange(3, 90) for _ in range(prompt)]
    params = SamplingParams(max_tokens=output, temperature=0, ignore_eos=True, detokenize=False)
    request = engine.add(ids, params, kv_policy=PolicySpec.parse(policy))
    sequence = request.sequences[0]
    while engine.has_work:
        engine.step()
        if sequence.row is not None:
            lanes = engine.cache.lanes
            held = [int(n) for n in lanes.held[sequence.row]]
            yield int(lanes.seen[sequence.row]), held, walk(engine.cache, sequence.row)


POLICIES = [
    "full", "streaming(window=20)", "h2o(budget=24)", "h2o(budget=24)+chunk(tokens=16)+slack(tokens=5)",
    "tova(budget=20)", "snapkv(budget=40)", "snapkv(budget=40)+pyramid", "snapkv(budget=40)+adaptive",
    "snapkv(budget=40)+global", "knorm(keep=0.5,skip_layers=1)", "random(budget=30)+every(tokens=8)",
]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("prompt, output", [(90, 20), (21, 30)])
def test_what_is_planned_is_what_is_in_use(folder, engine, policy, prompt, output):
    spec = PolicySpec.parse(policy)
    kv = find_model(str(folder)).kv_spec(engine.cache.spec.block_size, "fp32")
    assert kv == engine.cache.spec
    planned = request_footprint(kv, spec, prompt, output, CHUNK)
    settled = None
    for seen, held, used in trace(engine, prompt, output, policy):
        assert held_bytes(kv, spec, held, seen) == used
        assert used <= planned.peak.high
        if seen == prompt:
            settled = used
    assert settled is not None
    assert planned.settled.low <= settled <= planned.settled.high
    if spec.lengths_known and not any(layer.window for layer in kv.layers):
        assert planned.settled.exact


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("prompt, output", [(90, 20), (21, 32), (95, 1), (48, 2)])
def test_the_highest_in_use_of_a_request_alone_is_the_planned_peak(engine, policy, prompt, output):
    engine.cache.arena.peak_bytes = 0
    for _ in trace(engine, prompt, output, policy):
        pass
    planned = solo_peak(engine.cache.spec, PolicySpec.parse(policy), prompt, output, CHUNK)
    assert planned is not None or policy != "full"
    assert planned in (None, engine.cache.arena.peak_bytes)


def test_the_longest_stretch_is_that_of_the_kernels():
    kernels = pytest.importorskip("kvloom.kernels.cpu._ext", reason="the CPU kernels are not built")
    assert kernels.LONGEST_STRETCH == LONGEST_STRETCH
