"""A checkpoint's config becomes a DecoderConfig, or is refused with every reason."""

import pytest

from harness import tiny
from kvloom.errors import CheckpointError, UnsupportedError
from kvloom.models.families import FAMILIES
from kvloom.spec.decoder import RopeConfig
from kvloom.spec.families import FAMILY_CONFIGS, family_of_config, family_of_gguf

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **tiny.LLAMA}
GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", **tiny.GEMMA3}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def config_of(raw, **changes):
    """Return the DecoderConfig of `raw` with `changes`; None removes an entry."""
    raw = {key: value for key, value in {**raw, **changes}.items() if value is not None}
    return family_of_config(raw).read(raw)


def test_llama_reads_its_shape_and_mathematics():
    config = config_of(LLAMA)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (32, 64, 96)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.num_layers) == (4, 2, 8, 2)
    assert (config.activation, config.query_scale, config.norm_eps) == ("silu", 8**-0.5, 1e-5)
    assert (config.qk_norm, config.sandwich_norm, config.tie_embeddings) == (False, False, False)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    assert config.layers[0].window is None


def test_gemma3_reads_windows_two_rope_bases_and_scales():
    config = config_of(GEMMA3)
    assert [layer.window for layer in config.layers] == [8, 8, 8, 8, 8, None, 8]
    assert [layer.rope.base for layer in config.layers] == [1e4] * 5 + [1e6] + [1e4]
    assert (config.query_scale, config.embedding_scale) == (24**-0.5, 32**0.5)
    assert (config.qk_norm, config.sandwich_norm, config.tie_embeddings) == (True, True, True)
    assert config.activation == "gelu_tanh"


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"rope_theta": 5e5}, RopeConfig(5e5)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}},
            RopeConfig(5e5, "linear", {"factor": 4.0}),
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeConfig(5e5)),
        (
            {"rope_parameters": {"rope_theta": 5e5, **LLAMA3_SCALING}},
            RopeConfig(
                5e5, "llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original": 128.0}
            ),
        ),
    ],
    ids=["older plain", "older linear", "newer plain", "newer llama3"],
)
def test_rope_is_read_in_the_older_and_the_newer_notation(entries, expected):
    assert config_of(LLAMA, **entries).layers[0].rope == expected


def test_gemma3_scales_only_the_layers_without_a_window_in_both_notations():
    older = config_of(
        GEMMA3, rope_theta=5e5, rope_local_base_freq=2e4, rope_scaling={"rope_type": "linear", "factor": 8}
    )
    newer = config_of(
        GEMMA3,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    )
    assert older == newer
    assert older.layers[5].rope == RopeConfig(5e5, "linear", {"factor": 8.0})
    assert older.layers[0].rope == RopeConfig(2e4)


def test_gemma3_takes_its_layers_from_a_list_or_from_a_pattern():
    kinds = ["full_attention", "sliding_attention"] * 3 + ["full_attention"]
    assert [layer.window for layer in config_of(GEMMA3, layer_types=kinds).layers] == [None, 8, None, 8, None, 8, None]
    by_two = config_of(GEMMA3, sliding_window_pattern=2)
    assert [layer.window for layer in by_two.layers] == [8, None, 8, None, 8, None, 8]


def test_the_text_part_of_a_multimodal_config_counts_with_its_family_s_defaults():
    raw = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": {"hidden_size": 2560, "num_hidden_layers": 34, "intermediate_size": 10240},
    }
    config = family_of_config(raw).read(raw)
    assert (config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads) == (2560, 34, 8, 4)
    assert config.eos_token_ids == (1, 106)


def test_a_model_type_is_enough_when_architectures_are_missing():
    assert family_of_config({"model_type": "gemma3_text"}).name == "gemma3"


@pytest.mark.parametrize(
    ("raw", "changes", "reason"),
    [
        (LLAMA, {"rope_scaling": {"rope_type": "mrope", "factor": 4}}, "'mrope'"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"hidden_act": "relu"}, "hidden_act 'relu'"),
        (LLAMA, {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        (GEMMA3, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA3, {"layer_types": ["full_attention"] * 6 + ["chunked_attention"]}, "'chunked_attention'"),
    ],
)
def test_what_cannot_run_is_refused_by_name(raw, changes, reason):
    with pytest.raises(UnsupportedError, match=reason):
        config_of(raw, **changes)


def test_all_reasons_of_a_refusal_come_together():
    with pytest.raises(UnsupportedError) as refusal:
        config_of(LLAMA, hidden_act="relu", quantization_config={"quant_method": "awq"}, rope_scaling={"type": "mrope"})
    assert len(refusal.value.reasons) == 3


def test_all_malformed_entries_come_together():
    with pytest.raises(CheckpointError) as fault:
        config_of(LLAMA, hidden_size="big", num_hidden_layers=-1, tie_word_embeddings="yes", eos_token_id="</s>")
    for key in ("hidden_size is 'big'", "num_hidden_layers is -1", "tie_word_embeddings is 'yes'", "eos_token_id"):
        assert key in str(fault.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 3},
        {"head_dim": 7},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": "linear"},
        {"rope_theta": float("inf")},
    ],
)
def test_a_contradictory_config_is_a_checkpoint_error(changes):
    with pytest.raises(CheckpointError):
        config_of(LLAMA, **changes)


def test_an_unknown_architecture_is_refused_with_the_known_and_the_nearest_one():
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM.*did you mean 'LlamaForCausalLM'"):
        family_of_config({"architectures": ["LLamaForCausalLM"]})


def test_remote_code_is_named_as_a_reason_and_never_run():
    with pytest.raises(UnsupportedError, match="never runs"):
        family_of_config({"architectures": ["MyModel"], "auto_map": {"AutoModel": "modeling.MyModel"}})


def test_an_unknown_gguf_architecture_is_refused_with_the_known_ones():
    with pytest.raises(UnsupportedError, match=r"'mamba'.*llama, qwen2"):
        family_of_gguf("mamba")


def test_every_family_whose_configs_are_read_has_a_mapping_of_weights():
    assert {name: family.config for name, family in FAMILIES.items()} == dict(FAMILY_CONFIGS.items())


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_names_each_of_its_tensors_once(name):
    family = FAMILIES.get(name)
    config = family.config.read({**tiny.LLAMA, **EXTRA.get(name, {}), "attention_bias": True})
    expected = list(family.expected(config))
    assert len({canonical for canonical, _, _ in expected}) == len(expected)
    stored = {source for _, layer, weight in expected for source in weight.sources(config, layer, False)}
    whole = [weight for _, _, weight in expected if weight.hf_shape is None and "{e}" not in weight.hf]
    assert len(stored) >= len(whole)


@pytest.mark.parametrize("name", [n for n, family in FAMILY_CONFIGS.items() if family.gguf_architecture])
def test_every_family_that_gguf_files_have_names_all_its_tensors_there(name):
    family = FAMILIES.get(name)
    config = family.config.read({**tiny.LLAMA, **EXTRA.get(name, {})})
    for _, layer, weight in family.expected(config):
        assert all(source and "{" not in source for source in weight.sources(config, layer, True))


EXTRA = {"gemma3": tiny.GEMMA3}
