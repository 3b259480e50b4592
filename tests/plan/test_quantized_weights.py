"""Planned weights in 8 and 4 bits against those that the engine holds, and what follows from them."""

from dataclasses import replace
from itertools import pairwise

import pytest

from harness.families import VARIANTS, oracle_of
from harness.tiny_model import tiny_config
from kvloom.cli.plantext import show
from kvloom.errors import InvalidInputError, UnsupportedError
from kvloom.plan.advice import advise
from kvloom.plan.answer import Plan
from kvloom.plan.compare import compare
from kvloom.plan.explain import explain
from kvloom.plan.memory import Memory
from kvloom.plan.question import Question
from kvloom.plan.recommend import recommend
from kvloom.plan.roofline import Roofline
from kvloom.plan.serving import serve_refusals
from kvloom.plan.source import find_model
from kvloom.spec.catalogue import catalogue_names, catalogue_spec
from kvloom.spec.hardware import DeviceSpec, find_device
from kvloom.spec.kernels import BLOCK_SLOTS, KERNEL_ACTIVATIONS, MAX_HEAD_DIM, unsupported
from kvloom.spec.packing import QUANTIZATIONS


def ask(model="smollm2", device="cpu:8GiB", prompt=3584, output=512, **facts):
    """Return a question about a catalogue model on a CPU."""
    return Question(catalogue_spec(model), find_device(device), prompt, output, **facts)


WIDTHS = {
    "llama": {"hidden_size": 80, "intermediate_size": 1000, "head_dim": 16, "attention_bias": True},
    "mistral, no window": {"head_dim": 48, "hidden_size": 1600},
    "qwen2": {"hidden_size": 64, "intermediate_size": 3100},
    "qwen3": {},
    "qwen3, biases": {},
    "smollm3": {"hidden_size": 64},
    "gemma2": {},
    "glm, neighbours on half of each head": {},
    "phi3, window": {"hidden_size": 64},
    "gpt-neox": {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 1000},
    "gpt2": {"n_embd": 80, "n_head": 5, "n_inner": 1000, "n_positions": 100},
    "gpt-bigcode": {"n_embd": 80, "n_head": 5},
    "falcon 40b": {"hidden_size": 64},
    "falcon, one after the other": {"hidden_size": 64},
    "bloom": {"hidden_size": 80, "n_head": 5},
    "mpt": {"d_model": 80, "n_heads": 5},
    "mixtral": {"hidden_size": 64, "intermediate_size": 72},
    "qwen3-moe, every other layer": {"moe_intermediate_size": 40},
    "gpt-oss": {"intermediate_size": 72},
}
"""Families that the kernels run, with widths that leave panels, groups and slices in part empty."""


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("variant", WIDTHS)
def test_planned_weights_are_those_of_the_engine(variant, dtype, quantization, folder_of):
    torch = pytest.importorskip("torch")
    pytest.importorskip("kvloom.kernels.cpu._ext", reason="the CPU kernels are not built")
    from kvloom.models.checkpoint import open_checkpoint
    from kvloom.models.compiled import CompiledModel

    folder = folder_of(variant)
    checkpoint, kind = open_checkpoint(folder), getattr(torch, dtype)
    model = CompiledModel(checkpoint.config, checkpoint.tensors(kind), kind, quantization)
    asked = Question(find_model(folder), find_device("cpu"), 90, 10, dtype=dtype, quantization=quantization)
    assert Memory(asked).process.weights.value == model.num_bytes
    assert Memory(asked).process.weights.label == Roofline(asked).reads.weights_label == "exact"
    assert serve_refusals(asked) == []


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Function that returns the folder of a variant in the widths above, made once."""
    made = {}

    def make(variant):
        if variant not in made:
            kind, changes = VARIANTS[variant]
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(VARIANTS, variant, (kind, {**changes, **WIDTHS[variant]}))
                made[variant] = str(tmp_path_factory.mktemp("model"))
                oracle_of(variant).save_pretrained(made[variant])
        return made[variant]

    return make


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_plan_knows_which_shapes_the_kernels_run(variant, tmp_path):
    from kvloom.models.checkpoint import open_checkpoint

    oracle_of(variant).save_pretrained(tmp_path)
    reasons = unsupported(open_checkpoint(str(tmp_path)).config, BLOCK_SLOTS)
    asked = Question(find_model(str(tmp_path)), find_device("cpu"), 9, 1, quantization="int8")
    assert list(asked.packed.obstacles) == reasons


def test_the_plan_knows_which_blocks_and_heads_the_kernels_take():
    from kvloom.kernels.cpu.elements import ACTIVATION

    assert (*ACTIVATION, "xielu") == KERNEL_ACTIVATIONS
    for head_dim in (2, 80, MAX_HEAD_DIM, MAX_HEAD_DIM + 2):
        runs = unsupported(tiny_config("llama", head_dim=head_dim), BLOCK_SLOTS) == []
        assert runs is (head_dim <= MAX_HEAD_DIM)


@pytest.mark.real_model
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("path", ["smollm2_path", "gemma_path"])
def test_planned_weights_of_a_real_model_are_those_of_the_engine(request, path, quantization):
    from kvloom import LLM

    path = request.getfixturevalue(path)
    asked = Question(find_model(str(path)), find_device("cpu:16GiB"), 90, 10, quantization=quantization)
    llm = LLM(str(path), dtype=asked.dtype, quantization=quantization, kv_cache_memory_bytes=64 << 20, populate=False)
    held = llm.engine.runner.model.num_bytes
    print(f"{asked.model.name} {quantization}: planned {Memory(asked).process.weights.value:,}, held {held:,}")
    assert (Memory(asked).process.weights.value, Memory(asked).process.weights.label) == (held, "exact")


@pytest.mark.parametrize("quantization, held", [("int8", 135_439_104), ("w8a8", 164_176_128), ("int4", 95_003_904)])
def test_weights_of_smollm2_are_those_of_its_shape(quantization, held):
    assert Memory(ask(quantization=quantization)).process.weights.value == held


@pytest.mark.parametrize(
    "change, words",
    [({"device": find_device("h100")}, "on CPUs, not on h100"), ({"dtype": "float8_e4m3fn"}, "not in float8_e4m3fn"),
     ({"block_size": 8}, "a multiple of 16 tokens, not of 8")],
)  # fmt: skip
def test_what_the_kernels_never_run_is_refused_with_the_reason(change, words):
    with pytest.raises(UnsupportedError, match=words):
        replace(ask(quantization="int8"), **change)


def test_an_unknown_quantization_names_the_nearest():
    with pytest.raises(InvalidInputError, match=r"did you mean 'int4'.*known: int8, int4, w8a8"):
        ask(quantization="int5x4")


@pytest.mark.parametrize(
    "model, words",
    [("deepseek-v2", "latent attention"), ("mamba-130m", "recurrent layers"),
     ("gemma-3n-e4b", "share keys and values")],
)  # fmt: skip
def test_weights_that_no_kernel_runs_are_estimated_and_have_no_command(model, words):
    asked = ask(model, "cpu:900GiB", 900, 100, quantization="int8")
    weights = Memory(asked).process.weights
    assert (weights.label, Roofline(asked).reads.weights_label) == ("assumed", "assumed")
    assert "do not run this model" in weights.note
    assert words in "; ".join(serve_refusals(asked))
    assert recommend(asked, model, 0.01, None).command == ""


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("model", catalogue_names())
def test_a_step_reads_no_more_than_is_held_and_no_less_than_its_bits(model, quantization):
    asked = ask(model, "cpu:900GiB", 90, 10, quantization=quantization)
    layers, vocabulary = asked.packed.layers, asked.packed.vocabulary
    params = asked.model.layer_matrix_params, asked.model.head_params
    least = (params[0] * layers.bits + params[1] * vocabulary.bits) / 8
    assert least <= Roofline(asked).reads.weight_bytes(1) <= min(1.02 * least, Memory(asked).process.weights.value)


def test_loading_counts_the_embedding_beside_its_packed_copy():
    memory = Memory(ask("gemma-3-270m", quantization="int4"))
    rows = 262_144
    packed = rows * (640 + 4)
    assert memory.process.loading.value == rows * 640 * 2 + packed - memory.process.weights.value + (32 << 20)


def test_loading_a_large_model_counts_the_last_gate_and_up():
    memory = Memory(ask("llama-3-8b", "cpu:64GiB", quantization="int8"))
    assert memory.process.loading.value == 2 * 2 * (2 * 14336 * 4096) + (32 << 20)


def test_fewer_bits_leave_room_for_more_users_and_take_less_time():
    device = DeviceSpec("cpu", 1 << 30, 1e10, (("bfloat16", 1e12),), "cpu", measured=True)
    plain = replace(ask(), device=device)
    plans = [Plan(replace(plain, quantization=name)) for name in ("int4", "int8", "w8a8", None)]
    for better, worse in pairwise(plans):
        assert better.sizes["total"].value < worse.sizes["total"].value
        assert better.limits["max_users"].value >= worse.limits["max_users"].value
        assert better.speeds["tpot_lower_bound"].value < worse.speeds["tpot_lower_bound"].value
        assert better.speeds["kv_bound_context"].value < worse.speeds["kv_bound_context"].value
        assert better.speeds["decode_flops"] == worse.speeds["decode_flops"]


def on(peaks, **facts):
    """Return a question on a probed CPU of these peaks with a prompt that arithmetic decides."""
    device = DeviceSpec("cpu", 8 << 30, 1e11, tuple(peaks.items()), "cpu", measured=True)
    return replace(ask(**facts), device=device)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_weights_alone_in_few_bits_multiply_at_the_peak_of_the_dtype(quantization):
    time = Roofline(on({"bfloat16": 1e12, "w8a8": 4e12}, quantization=quantization)).ttft()
    assert (time.label, time.value) == ("measured", Roofline(ask()).operations.prefill_flops(3584) / 1e12)


def test_activations_in_8_bits_multiply_at_their_own_peak_where_it_is_known():
    time = Roofline(on({"bfloat16": 1e12, "w8a8": 4e12}, quantization="w8a8")).ttft()
    assert (time.label, time.value) == ("measured", Roofline(ask()).operations.prefill_flops(3584) / 4e12)


def test_where_it_is_not_known_that_of_the_dtype_stands_in_and_is_assumed():
    asked = on({"bfloat16": 1e12}, quantization="w8a8")
    time = Roofline(asked).ttft()
    assert (time.label, time.value) == ("assumed", Roofline(ask()).operations.prefill_flops(3584) / 1e12)
    assert time.low == Roofline(asked).reads.weight_bytes(1) / 1e11
    assert "8-bit activations is not known" in time.note
    assert Roofline(asked).rates.speed_label == "assumed"
    assert "2 ms to 1" in show(replace(time, low=0.002, value=1.5))
    assert "that of bfloat16 is used" in " ".join(explain(asked, "intensity").lines)
    assert Roofline(asked).tpot().label == "measured"  # bandwidth decides it


@pytest.mark.parametrize("target, possible", [(2.0, True), (0.1, None), (1e-4, False)])
def test_a_target_between_what_is_sure_and_what_is_assumed_is_not_known_to_be_possible(target, possible):
    plan = Plan(on({"bfloat16": 1e12}, quantization="w8a8", target_ttft=target))
    assert plan.targets == {"ttft": possible}


def test_weights_in_fewer_bits_are_advised_on_a_cpu_alone():
    def advised(asked):
        return [advice.flags for advice in advise(asked) if advice.flags.startswith("--quantization")]

    tight = ask(device="cpu:600MiB")
    assert advised(tight) == ["--quantization int8", "--quantization int4"]
    assert advised(replace(tight, quantization="int8")) == []
    assert advised(replace(tight, block_size=8)) == []
    assert advised(ask("deepseek-v2")) == []
    assert advised(ask("llama-3-70b", "h100")) == []


def test_comparisons_and_what_is_to_be_measured_keep_the_quantization():
    asked = ask(device="cpu:600MiB", users=4, quantization="int8")
    for what in ("attention", "policies"):
        plain = compare(replace(asked, quantization=None), what)
        assert all(row.max_users >= other.max_users for row, other in zip(compare(asked, what), plain, strict=True))
    assert "--quantization int8" in recommend(asked, "smollm2", 0.01, None).promise
