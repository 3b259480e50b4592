"""What a plan answers: sums, limits, rooflines, comparisons, advice and recommendation."""

import json
import shlex
from dataclasses import replace
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.cli.main import cli
from kvloom.errors import InvalidInputError, UnsupportedError
from kvloom.plan.advice import advise
from kvloom.plan.answer import Plan
from kvloom.plan.compare import COMPARISONS, compare
from kvloom.plan.explain import TOPICS, explain
from kvloom.plan.measured import read_measurements
from kvloom.plan.memory import Memory
from kvloom.plan.operations import causal_pairs
from kvloom.plan.process import device_params
from kvloom.plan.question import Question
from kvloom.plan.recommend import parse_loss, recommend
from kvloom.plan.roofline import Roofline
from kvloom.spec.catalogue import catalogue_names, catalogue_spec
from kvloom.spec.format import SERVED_STORES
from kvloom.spec.hardware import find_device
from kvloom.spec.hypothetical import Hypothesis
from kvloom.spec.policy import PolicySpec
from kvloom.units import GIB


def ask(model="llama-3-8b", device="h100", prompt=3584, output=512, **facts):
    """Return a question with everything but the given facts at its usual value."""
    return Question(catalogue_spec(model), find_device(device), prompt, output, **facts)


def test_weights_and_kv_of_llama_3_8b_are_those_of_its_shape():
    memory = Memory(ask(users=32))
    assert memory.process.weights.value == 2 * 8_030_261_248
    assert memory.kv.value == 32 * 4096 * 131_072
    labels = memory.process.weights.label, memory.kv.label, memory.process.activations.label
    assert labels == ("exact", "exact", "assumed")


def test_the_kv_of_one_request_is_exact_alone_and_a_bound_beside_others():
    facts = {"device": "cpu:8GiB", "prompt": 16_000, "output": 32, "dtype": "float32"}
    alone, beside = (Memory(ask("gemma-3-270m", users=n, **facts)) for n in (1, 4))
    one = alone.kv_of_request
    assert (one.label, one.value, one.low) == ("exact", 166_723_584, None)
    assert (alone.kv.label, alone.kv.low) == ("bound", 166_723_584)
    assert beside.kv_of_request.label == beside.kv.label == "bound"
    assert beside.kv_of_request.low < alone.kv_of_request.value < beside.kv_of_request.value == alone.kv.value


def test_the_total_is_the_sum_of_its_parts():
    memory = Memory(ask(users=8))
    process = memory.process
    parts = (process.weights, process.activations, process.runtime, process.tokenizer, memory.kv)
    assert memory.total.value == sum(part.value for part in parts)


def test_on_a_cpu_the_total_is_that_of_loading_where_running_takes_less():
    short, long = (Memory(ask("gemma-3-270m", "cpu:8GiB", prompt=n)) for n in (10, 100_000))
    idle = sum(part.value for part in (short.process.runtime, short.process.tokenizer, short.process.weights))
    assert short.total.value == idle + short.process.loading.value
    assert short.process.loading.value == 2 * 2 * 262_144 * 640 - short.process.weights.value + (32 << 20)
    assert long.total.value == idle + long.process.activations.value + long.kv.value


@pytest.mark.parametrize("model", ["llama-3-8b", "gemma-3-1b", "deepseek-v2-lite", "qwen3-next-80b-a3b"])
@pytest.mark.parametrize("policy", ["full", "int8", "snapkv(budget=512)", "streaming"])
def test_the_largest_batch_and_context_fit_and_one_more_does_not(model, policy):
    asked = ask(model, "mi300x", users=4, policy=PolicySpec.parse(policy))
    memory = Memory(asked)
    users, context = memory.max_users(), memory.max_context()
    assert users > 0
    assert Memory(replace(asked, users=users)).fits
    assert not Memory(replace(asked, users=users + 1)).fits
    assert Memory(asked.with_context(context)).fits
    if context < 1 << 30:
        assert not Memory(asked.with_context(context + 1)).fits


def test_a_model_that_does_not_fit_at_all_has_room_for_nobody():
    memory = Memory(ask("llama-3-70b", "l4"))
    assert (memory.fits, memory.max_users(), memory.max_context()) == (False, 0, 0)


def test_a_cpu_of_unknown_speed_has_memory_but_no_times():
    asked = ask("smollm2", "cpu:8GiB", users=2)
    assert Memory(asked).fits
    assert Roofline(asked).tpot().value is None


def test_kv_heads_are_divided_over_devices_and_replicated_where_there_are_fewer():
    whole = ask("llama-3-70b", "h100", users=4)
    assert [Memory(replace(whole, devices=n)).kv.value * n for n in (1, 2, 8)] == [Memory(whole).kv.value] * 3
    assert Memory(replace(whole, devices=16)).kv.value == Memory(replace(whole, devices=8)).kv.value


def test_the_latent_of_mla_is_replicated_on_every_device():
    one, eight = (Memory(ask("deepseek-v2", "h200", devices=n)) for n in (1, 8))
    assert one.kv.value == eight.kv.value
    assert device_params(catalogue_spec("deepseek-v2"), 8) > catalogue_spec("deepseek-v2").num_params / 8


@pytest.mark.parametrize("devices, words", [(3, "32 query heads"), (12, "8 KV heads")])
def test_heads_that_cannot_be_divided_are_refused(devices, words):
    with pytest.raises(UnsupportedError, match=words):
        ask(devices=devices)


def test_causal_pairs_are_counted_as_by_hand():
    assert causal_pairs(5, None) == 15
    assert causal_pairs(5, 2) == 1 + 2 * 4
    assert [causal_pairs(n, 3) for n in range(6)] == [sum(min(i, 3) for i in range(1, n + 1)) for n in range(6)]


def test_decode_of_llama_3_8b_reads_all_weights_but_the_embedding_and_every_key_and_value():
    roof = Roofline(ask(prompt=4095, output=1))
    model = catalogue_spec("llama-3-8b")
    assert roof.reads.weight_bytes(1) == 2 * (model.num_params - model.embedding_params - 65 * 4096)
    assert roof.reads.kv_read_bytes(4096, 0) == 4096 * 131_072
    assert roof.operations.decode_flops(4096, 0) == roof.reads.weight_bytes(1) + 32 * 2 * 32 * 4096 * 256


def test_times_are_bytes_over_bandwidth_and_operations_over_peak():
    roof = Roofline(ask())
    moved = roof.reads.weight_bytes(1) + sum(roof.reads.kv_read_bytes(3584, made) for made in range(1, 512)) / 511
    assert roof.tpot().value == pytest.approx(moved / 3.35e12)
    assert roof.ttft().value == pytest.approx(roof.operations.prefill_flops(3584) / 989.4e12)


def test_of_the_last_layer_a_prompt_needs_its_last_token_alone():
    model = catalogue_spec("llama-3-8b")
    layer = (model.layer_matrix_params) // 32
    heads = 2 * 32 * 256  # operations a query and key
    expected = 2 * (layer * (31 * 1000 + 1) + model.head_params) + heads * (31 * 1000 * 1001 // 2 + 1000)
    assert Roofline(ask(prompt=1000)).operations.prefill_flops(1000) == expected


def test_decode_turns_from_weights_to_kv_where_both_reads_are_equal():
    asked = ask(users=32)
    roof, context = Roofline(asked), Roofline(asked).kv_bound_context
    reads = roof.reads
    assert 32 * reads.kv_read_bytes(context - 1, 0) <= reads.weight_bytes(32) < 32 * reads.kv_read_bytes(context, 0)


def test_a_mixture_reads_at_least_one_tokens_experts_and_more_when_tokens_disagree():
    roof = Roofline(ask("mixtral-8x7b", "h200", users=16))
    model = catalogue_spec("mixtral-8x7b")
    idle = 32 * 6 * 3 * 4096 * 14336
    assert roof.reads.weight_bytes(16) == 2 * (model.num_params - idle - 32000 * 4096 - 65 * 4096)
    assert roof.reads.weight_bytes(16) < roof.reads.weight_bytes(16, expected=True) < 2 * model.num_params


def test_shared_layers_are_read_by_every_reader_but_stored_once():
    roof = Roofline(ask("gemma-3n-e4b", "h100", prompt=100, output=1))
    assert roof.reads.kv_read_bytes(100, 0) == 35 * 2 * 100 * 2 * 256 * 2


def test_a_store_shrinks_what_is_read_and_eviction_too():
    full = Roofline(ask()).reads.kv_read_bytes(4096, 0)
    assert Roofline(ask(policy=PolicySpec.parse("int8"))).reads.kv_read_bytes(4096, 0) == full * 132 / 256
    assert Roofline(ask(policy=PolicySpec.parse("snapkv(budget=1024)"))).reads.kv_read_bytes(4096, 0) == full / 4


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(catalogue_names()), st.integers(1, 5000), st.integers(0, 500), st.integers(1, 40))
def test_every_catalogue_model_can_be_planned_and_longer_never_needs_less(model, prompt, output, users):
    asked = ask(model, "mi300x", prompt, output, users=users)
    now, longer = Memory(asked), Memory(replace(asked, prompt=prompt + 100))
    assert now.kv.value <= longer.kv.value
    assert Roofline(asked).tpot().value <= Roofline(replace(asked, prompt=prompt + 100)).tpot().value


def test_comparing_attention_lists_the_model_first_and_mqa_smallest():
    rows = compare(ask(), "attention")
    assert [row.name for row in rows] == ["GQA-8 (the model)", "MHA", "MQA", "MLA (512+64)"]
    assert [row.bytes_per_token.value for row in rows] == [131_072, 524_288, 16_384, 36_864]
    assert [row.kv_of_request.label for row in rows] == ["exact", "assumed", "assumed", "assumed"]


def test_comparing_stores_says_which_only_exist_on_paper():
    rows = {row.name: row for row in compare(ask(), "stores")}
    assert rows["bf16"].max_users < rows["int8"].max_users
    assert "planned only" not in rows["bf16"].note
    assert all(("planned only" in rows[name].note) is (name not in SERVED_STORES) for name in ("int8", "int4", "kivi2"))


def test_comparing_policies_starts_with_the_asked_one():
    rows = compare(ask(policy=PolicySpec.parse("tova(budget=700)")), "policies")
    assert rows[0].name == "tova(budget=700)"
    assert any(row.kv_of_request.low is not None for row in rows)


def test_an_unknown_comparison_names_the_nearest():
    with pytest.raises(InvalidInputError, match="did you mean 'stores'"):
        compare(ask(), "store")


def test_advice_is_given_only_when_it_does_not_fit_and_says_what_is_enough():
    assert advise(ask(users=2)) == []
    found = advise(ask(users=200, device="a100-80"))
    assert any(advice.enough for advice in found)
    users = next(a for a in found if a.flags.startswith("--users"))
    assert int(users.flags.split()[1]) == Memory(ask(users=200, device="a100-80")).max_users()


def test_the_advised_number_of_devices_is_the_smallest_that_fits():
    asked = ask("llama-3-70b", "h100", users=16)
    flags = next(a.flags for a in advise(asked) if a.flags.startswith("--devices"))
    assert flags == "--devices 4"
    assert not Memory(replace(asked, devices=2)).fits


RESULTS = {
    "schema": "kvloom.measure/1",
    "model": "llama-3-8b",
    "machine": "test",
    "results": [
        {"policy": "knorm(budget=2048)", "context": 4096, "loss": 0.001, "loss_high": 0.004, "metric": "perplexity",
         "tpot_s": 0.02},
        {"policy": "snapkv(budget=512)", "context": 4096, "loss": 0.008, "loss_high": 0.009, "metric": "perplexity"},
        {"policy": "snapkv(budget=256)", "context": 4096, "loss": 0.1, "loss_high": 0.2, "metric": "perplexity"},
    ],
}  # fmt: skip


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULTS))
    return read_measurements(path)


def test_the_full_cache_is_recommended_when_it_fits(results):
    found = recommend(ask(users=2), "llama-3-8b", 0.01, results)
    assert (str(found.policy), found.measurement) == ("full", None)


def test_the_least_lossy_policy_that_fits_is_recommended_with_its_command(results):
    found = recommend(ask(users=150, device="cpu:80GiB"), "llama-3-8b", 0.01, results)
    assert str(found.policy) == "knorm(budget=2048)"
    assert "--kv-policy 'knorm(budget=2048)'" in found.command
    assert "at most 0.40% loss" in found.promise


def test_a_recommendation_for_what_does_not_run_yet_says_why_there_is_no_command(results):
    found = recommend(ask(users=150, device="h100"), "llama-3-8b", 0.01, results)
    assert found.command == ""
    assert "not yet on h100" in found.promise


def test_a_policy_whose_interval_exceeds_the_loss_is_not_recommended(results):
    assert recommend(ask(users=150), "llama-3-8b", 0.003, results).policy is None


def test_a_budget_that_was_never_filled_promises_nothing_for_longer_prompts(tmp_path):
    entry = {"policy": "knorm(budget=2048)", "context": 2048, "loss": 0.0, "evicted_tokens": 0}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**RESULTS, "results": [entry]}))
    assert recommend(ask(users=150), "llama-3-8b", 0.01, read_measurements(path)).policy is None
    path.write_text(json.dumps({**RESULTS, "results": [{**entry, "evicted_tokens": 1}]}))
    assert str(recommend(ask(users=150), "llama-3-8b", 0.01, read_measurements(path)).policy) == "knorm(budget=2048)"


def test_a_promise_says_over_how_much_text_and_never_promises_a_gain(tmp_path):
    entry = {"policy": "knorm(budget=2048)", "context": 4096, "loss": -0.02, "loss_high": -0.01, "windows": 32,
             "metric": "perplexity"}  # fmt: skip
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**RESULTS, "results": [entry]}))
    found = recommend(ask(users=150), "llama-3-8b", 0.01, read_measurements(path))
    assert "at most 0.00% loss of perplexity measured at 4096 tokens over 32 windows" in found.promise


def test_what_is_missing_is_named_as_a_command_that_measures_it():
    found = recommend(ask(users=150), "llama-3-8b", 0.01, None)
    words = shlex.split(found.promise[found.promise.index("kvloom measure") :])
    command = dict(cli.leaves())["measure"]
    context = command.make_context("measure", words[2:])
    assert context.params["kv_policies"] == tuple(map(str, found.candidates))
    assert context.params["context"] == 2048


def test_more_users_need_a_stronger_policy(results):
    assert str(recommend(ask(users=150), "llama-3-8b", 0.01, results).policy) == "knorm(budget=2048)"
    assert str(recommend(ask(users=250), "llama-3-8b", 0.01, results).policy) == "snapkv(budget=512)"


def test_a_measured_policy_in_a_store_that_is_not_served_is_not_recommended(tmp_path):
    stored = {"policy": "int4", "context": 4096, "loss": 0.0, "metric": "perplexity"}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**RESULTS, "results": [stored]}))
    assert recommend(ask(users=150), "llama-3-8b", 0.01, read_measurements(path)).policy is None


def test_without_measurements_the_candidates_and_what_is_needed_of_them_are_named():
    asked = ask(users=150)
    found = recommend(asked, "llama-3-8b", 0.01, None)
    assert (found.policy, found.command) == (None, "")
    assert PolicySpec.parse("snapkv(budget=896)") in found.candidates
    assert all(Memory(replace(asked, policy=policy)).fits for policy in found.candidates)
    assert "--measured" in found.promise


@pytest.mark.parametrize("text, value", [("1%", 0.01), ("0.02", 0.02), ("0%", 0.0)])
def test_a_loss_is_a_share(text, value):
    assert parse_loss(text) == value


@pytest.mark.parametrize("text", ["100%", "-1%", "little", "1.5"])
def test_a_loss_that_is_no_share_is_refused(text):
    with pytest.raises(InvalidInputError, match="--max-loss"):
        parse_loss(text)


@pytest.mark.parametrize(
    "change",
    [{"schema": "x"}, {"results": []}, {"results": [{"policy": "int8", "context": 1, "loss": "a"}]},
     {"results": [{"context": 1, "loss": 0.1}]}, {"results": [{"policy": "nt8", "context": 1, "loss": 0.1}]}],
)  # fmt: skip
def test_results_that_cannot_be_read_are_refused(tmp_path, change):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**RESULTS, **change}))
    with pytest.raises(InvalidInputError):
        read_measurements(path)


def test_measured_speed_is_shown_beside_the_bound(results):
    plan = Plan(ask(policy=PolicySpec.parse("knorm(budget=2048)")), results)
    assert (plan.speeds["tpot_measured"].value, plan.speeds["tpot_measured"].label) == (0.02, "measured")


def test_a_target_below_the_bound_is_impossible():
    plan = Plan(ask(target_tpot=1e-4, target_ttft=10.0))
    assert plan.targets == {"ttft": True, "tpot": False}


@pytest.mark.parametrize("device, quantization", [("h200", None), ("cpu:64GiB", "w8a8")])
@pytest.mark.parametrize("model", ["llama-3-8b", "mixtral-8x7b", "qwen3-next-80b-a3b", "mamba-130m", "gemma-3-270m"])
def test_the_answer_obeys_its_schema(model, device, quantization):
    jsonschema = pytest.importorskip("jsonschema")
    asked = ask(model, device, users=300, target_ttft=1.0, quantization=quantization)
    attends = bool(asked.model.kv_layers)
    plan = Plan(
        asked,
        None,
        {what: compare(asked, what) for what in COMPARISONS} if attends else {},
        tuple(explain(asked, topic) for topic in TOPICS) if attends else (),
        recommend(asked, model, 0.01, None) if attends else None,
    )
    schema = json.loads(resources.files("kvloom.plan").joinpath("schema.json").read_text())
    jsonschema.validate(json.loads(json.dumps(plan.json())), schema)


def test_the_table_says_what_fits():
    contexts, users, cells = Plan(ask(users=32)).grid
    row, column = contexts.index(4096), users.index(32)
    size, fits = cells[row][column]
    assert (fits, size > 30 * GIB) == (True, True)
    assert cells[contexts.index(8192)][users.index(128)][1] is False


def test_a_hypothetical_model_is_labelled_assumed():
    asked = Question(Hypothesis(layers=4, heads=8, head_dim=64).build(), find_device("h100"), 100, 10)
    assert Memory(asked).process.weights.label == "assumed"
    assert Memory(asked).kv.value == 112 * 4 * 8 * 64 * 2 * 2


@pytest.mark.parametrize(
    ("facts", "asked", "message"),
    [
        ({}, {"model": "llama-3-70b"}, "holds results of model llama-3-8b, not llama-3-70b"),
        ({}, {"device": "h100"}, "device cpu, not gpu"),
        ({"dtype": "float32"}, {"device": "cpu:80GiB"}, "dtype float32, not bfloat16"),
        ({"quantization": "int8"}, {"device": "cpu:80GiB"}, "quantization int8, not none"),
        ({"quantization": None}, {"device": "cpu:80GiB", "quantization": "int4"}, "quantization none, not int4"),
    ],
)
def test_measurements_of_something_else_are_refused_naming_both(tmp_path, facts, asked, message):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**RESULTS, "facts": facts}))
    with pytest.raises(InvalidInputError, match=message):
        read_measurements(path).check_for(ask(**{"device": "cpu:80GiB", **asked}))
    read_measurements(path).check_for(
        ask(device="cpu:80GiB", dtype=facts.get("dtype", "bfloat16"), quantization=facts.get("quantization"))
    )


def test_native_fp8_weights_are_multiplied_at_the_peak_of_fp8():
    from kvloom.spec.model import WeightFormat

    plain = ask("llama-3-8b", "h100")
    stored = replace(plain, model=replace(plain.model, weight_format=WeightFormat("fp8", 8.0, "layers")))
    peaks = dict(plain.device.peaks)
    assert (Roofline(plain).rates.peak, Roofline(stored).rates.peak) == (peaks["bfloat16"], peaks["float8_e4m3fn"])
    assert Roofline(stored).ttft().value == pytest.approx(Roofline(plain).ttft().value * 989.4 / 1978.9)
    assert Roofline(replace(stored, device=find_device("a100-80"))).rates.peak == 312e12  # which has no FP8
