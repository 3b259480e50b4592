"""What a plan prints to be run: the command line's own flags, the engine's own checks."""

import shlex
from contextlib import suppress
from dataclasses import fields, replace

import pytest

from kvloom.cli.engineflags import engine_arguments
from kvloom.cli.plan import make_plan, plan
from kvloom.cli.serve import serve
from kvloom.engine.config import EngineConfig
from kvloom.errors import InvalidInputError, KvloomError, UnsupportedError
from kvloom.models.catalogue import CATALOGUE
from kvloom.plan.advice import advise
from kvloom.plan.compare import candidate_policies
from kvloom.plan.memory import Memory
from kvloom.plan.question import Question
from kvloom.plan.serving import (
    SERVED_DTYPES,
    SERVED_NAMES,
    policy_refusals,
    serve_command,
    serve_refusals,
    served_name,
)
from kvloom.policies.policy import Policy
from kvloom.policies.reading import read_policy
from kvloom.spec.architectures import ARCHITECTURES
from kvloom.spec.catalogue import catalogue_names, catalogue_spec
from kvloom.spec.config_json import spec_from_config
from kvloom.spec.families import FAMILY_CONFIGS
from kvloom.spec.format import SERVED_STORES, store_names
from kvloom.spec.hardware import find_device
from kvloom.spec.method import METHODS
from kvloom.spec.model import DTYPE_BYTES
from kvloom.spec.policy import FULL, PolicySpec
from kvloom.spec.store import NATIVE_STORE


def ask(model="smollm2", device="cpu:8GiB", prompt=3584, output=512, **facts):
    """Return a question about a catalogue model on a CPU."""
    return Question(catalogue_spec(model), find_device(device), prompt, output, **facts)


def read_serve(command):
    """Return the flags that `kvloom serve` reads from a command line, by its own parser, and the engine's options."""
    words = shlex.split(command)
    assert words[:2] == ["kvloom", "serve"]
    with serve.make_context("serve", words[2:]) as context:
        values = dict(context.params)
    names = {field.name for field in fields(EngineConfig)}
    options = {name: value for name, value in engine_arguments(values).items() if name in names}
    options["kv_policy"] = read_policy(options["kv_policy"] or FULL)
    return values, EngineConfig(**options)


CASES = [
    ask(users=4), ask(users=3, block_size=32, chunk=512), ask("gemma-3-270m", users=2, dtype="float32"),
    ask(users=8, policy=PolicySpec.parse("snapkv(budget=896)")), ask("llama-3-8b", "cpu:64GiB", users=16),
    ask(users=5, policy=PolicySpec.parse("streaming(sinks=4,window=508)")),
    ask("mistral-7b-v0.1", "cpu:64GiB", 7000, 500),
    ask("gpt-oss-20b", "cpu:64GiB", policy=PolicySpec.parse("streaming")), ask(users=2, quantization="int8"),
    ask("llama-3-8b", "cpu:64GiB", users=16, quantization="w8a8", block_size=32),
    ask("gemma-3-270m", dtype="float16", quantization="int4", policy=PolicySpec.parse("snapkv(budget=896)")),
]  # fmt: skip


def named(asked):
    """Return what tells one case from the others."""
    return f"{asked.model.name} {asked.policy} {asked.users} {asked.quantization}"


@pytest.mark.parametrize("asked", CASES, ids=named)
def test_the_printed_command_is_read_back_to_the_question_and_its_arena_holds_all_users(asked):
    values, config = read_serve(serve_command(asked, asked.model.name))
    assert values["max_num_seqs"] == asked.users
    assert (config.block_size, config.max_num_batched_tokens, config.dtype, config.quantization) == (
        asked.block_size,
        asked.chunk,
        asked.dtype,
        asked.quantization,
    )
    kv = asked.whole_kv
    kv_bytes = config.resolve_kv_bytes(kv, asked.model.max_position)
    assert kv_bytes >= Memory(asked).kv_bytes(asked)
    longest = config.resolve_max_model_len(kv, asked.model.max_position, kv_bytes)
    assert longest == asked.context or asked.policy.evicts
    assert config.kv_policy == asked.policy
    assert (Policy.of(config.kv_policy) is None) is (asked.policy == FULL)


@pytest.mark.parametrize("model", [name for name in catalogue_names() if catalogue_spec(name).kv_layers])
def test_every_policy_that_is_recommended_without_a_reason_against_it_is_read_by_the_engine(model):
    asked = ask(model, "cpu:64GiB", prompt=900, output=100)
    candidates = candidate_policies(asked)
    assert candidates
    for policy in candidates:
        if not policy_refusals(replace(asked, policy=policy)):
            assert read_policy(str(policy)) == policy
            Policy.of(policy)


@pytest.mark.parametrize("store", store_names())
def test_the_plan_knows_which_stores_the_engine_serves(store):
    try:
        Policy.parse(store)
        served = True
    except UnsupportedError:
        served = False
    assert served is (store in SERVED_STORES or store in NATIVE_STORE.values())


def test_the_plan_knows_which_architectures_run():
    running = {name for _, family in FAMILY_CONFIGS.items() for name in family.model_types}
    assert not set(ARCHITECTURES) & running
    for name in catalogue_names():
        spec = catalogue_spec(name)
        assert (spec.decoder is None) is (spec.family in ARCHITECTURES), name


@pytest.mark.parametrize(
    ("family", "method", "runs"), [("gpt_oss", "mxfp4", True), ("gpt_oss", "fp8", False), ("llama", "fp8", False)]
)
def test_the_plan_serves_the_stored_weights_that_the_engine_reads(family, method, runs):
    raw = {"model_type": family, "torch_dtype": "bfloat16", "quantization_config": {"quant_method": method}}
    asked = Question(spec_from_config(raw, "mine"), find_device("cpu:640GiB"), 100, 10)
    refused = [reason for reason in serve_refusals(asked) if "quantization_config" in reason]
    assert bool(refused) is not runs
    if not runs:
        with pytest.raises(UnsupportedError, match="quantization_config"):
            FAMILY_CONFIGS.get(family).read(raw)


def test_the_plan_knows_which_methods_compute_attention():
    for name, method in METHODS.items():
        if method.role == "selector" and name not in ("full", "duo"):  # duo asks for a file
            needs = Policy.parse(f"{name}(budget=64)" if method.budgeted else name).needs
            assert needs.weighs is method.attention, name


@pytest.mark.parametrize(
    "asked, words",
    [
        (ask(device="h100"), "on h100"),
        (ask("llama-3-8b", "h100", devices=2), "tensor parallelism"),
        (ask("deepseek-v2"), "'deepseek_v2' does not run"),
        (ask(dtype="float8_e4m3fn"), "float8"),
        (ask(policy=PolicySpec.parse("int4")), "store int4"),
        (ask("deepseek-v2", quantization="int8"), "--quantization int8 does not run: it has latent attention"),
        (ask(prompt=9000), "made for 8192"),
        (ask("gpt-oss-20b", policy=PolicySpec.parse("tova(budget=9)")), "scores of this model have sinks"),
        (ask("mistral-7b-v0.1", policy=PolicySpec.parse("tova(budget=9)")), "nothing to evict"),
        (ask("gemma-3n-e4b", policy=PolicySpec.parse("streaming")), "share the lanes"),
        (ask(policy=PolicySpec.parse("h2o(budget=16)+vatp")), "protected"),
        (ask(policy=PolicySpec.parse("duo(window=64)")), "duo needs a pattern"),
    ],
)
def test_what_cannot_be_served_yet_has_a_reason(asked, words):
    assert words in "; ".join(serve_refusals(asked))


def test_the_plan_knows_which_names_the_engine_fetches_itself():
    assert set(CATALOGUE) == SERVED_NAMES
    assert all(served_name(name) == name for name in CATALOGUE)


def test_a_catalogue_name_is_served_by_its_id_and_a_config_by_its_folder(tmp_path):
    assert served_name("llama-3-8b") == "meta-llama/Meta-Llama-3-8B"
    assert served_name("someone/something") == "someone/something"
    config = tmp_path / "config.json"
    config.write_text("{}")
    assert served_name(str(config)) == str(tmp_path)


ADVISED = [
    ask(users=90, device="cpu:2GiB"),
    ask("llama-3-8b", "l4", users=9, dtype="float32"),
    ask("llama-3-8b", "l40s", users=76, dtype="bfloat16"),
    ask("llama-3-70b", "a100-40", users=18),
]


@pytest.mark.parametrize("asked", ADVISED)
def test_every_change_that_is_advised_is_accepted_by_plan_and_fits_when_it_says_so(asked):
    given = ["--prompt", asked.prompt, "--output", asked.output, "--users", asked.users, "--device", asked.device.name,
             "--dtype", asked.dtype]  # fmt: skip
    for advice in advise(asked):
        words = shlex.split(advice.flags)
        changed = {*words, *(("--prompt", "--output") if "--context" in words else ())}
        kept = [part for at in range(0, len(given), 2) if given[at] not in changed for part in given[at : at + 2]]
        arguments = [asked.model.name, *map(str, kept), *words]
        with plan.make_context("plan", arguments) as context:
            values = dict(context.params)
        try:
            again = make_plan(values.pop("model"), values).question
        except KvloomError as error:
            pytest.fail(f"{advice.flags} is refused: {error}")
        assert Memory(again).fits is advice.enough, advice


def test_float_types_that_are_served_are_those_of_the_engine():
    served = set()
    for dtype in DTYPE_BYTES:
        with suppress(InvalidInputError, UnsupportedError):
            EngineConfig(dtype=dtype)
            served.add(dtype)
    assert served == set(SERVED_DTYPES)
