"""A config that kvloom cannot run is refused, with every reason and before any weight is read."""

import json

import pytest
import tokenizers
import torch

from harness import tiny
from kvloom import LLM
from kvloom.errors import CheckpointError, InvalidInputError, UnsupportedError
from kvloom.models.checkpoint import open_checkpoint
from kvloom.models.tokenizer import Tokenizer
from kvloom.spec.families import family_of_config

BASE = {**tiny.LLAMA, "head_dim": 8}


def refused(architecture, **entries):
    """Return the error for a config of an architecture."""
    raw = {**BASE, **entries, "architectures": [architecture]}
    with pytest.raises((UnsupportedError, CheckpointError)) as error:
        family_of_config(raw).read(raw)
    return error.value


@pytest.mark.parametrize(
    ("architecture", "entries", "reasons"),
    [
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "mrope"}, "hidden_act": "relu"},
         ["'mrope'", "hidden_act 'relu'"]),
        ("MistralForCausalLM", {"rope_scaling": {"rope_type": "yarn"}, "sliding_window": -3},
         ["sliding_window is -3"]),
        ("LlamaForCausalLM", {"head_dim": 9, "rope_scaling": {"rope_type": "dynamic"}},
         ["head_dim is 9", "factor of the dynamic rotary embedding is missing"]),
        ("Phi3ForCausalLM", {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": "x"}},
         ["short_factor of the longrope", "long_factor of the longrope", "4 positive numbers"]),
        ("GlmForCausalLM", {"partial_rotary_factor": 0.4}, ["partial_rotary_factor is 0.4"]),
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, ["only whole heads are rotated"]),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "layer_types": ["full_attention", "chunked_attention"]},
         ["'chunked_attention'"]),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}, ["no_rope_layers is [1], expected a list of 2"]),
        ("FalconForCausalLM", {"alibi": True}, ["alibi true"]),
        ("MptForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 2, "no_bias": False, "logit_scale": 2.0,
                            "attn_config": {"alibi": False, "qk_ln": True}},
         ["no_bias", "logit_scale", "alibi false", "qk_ln"]),
        ("BloomForCausalLM", {"hidden_size": 33, "n_head": 4}, ["the hidden size is 33, expected a multiple of 4"]),
        ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
         ["scale_attn_by_inverse_layer_idx", "scale_attn_weights"]),
        ("MixtralForCausalLM", {"num_local_experts": 2, "num_experts_per_tok": 3}, ["at most 2"]),
        ("GptOssForCausalLM", {"quantization_config": {"quant_method": "awq"}}, ["awq"]),
        ("LlamaForCausalLM", {"quantization_config": {"quant_method": "mxfp4"}}, ["mxfp4"]),
    ],
)  # fmt: skip
def test_every_reason_is_named(architecture, entries, reasons):
    message = str(refused(architecture, **entries))
    assert [reason for reason in reasons if reason not in message] == []


def test_overrides_replace_entries_of_the_config_and_one_that_nothing_reads_is_refused():
    raw = {**BASE, "architectures": ["LlamaForCausalLM"]}
    family = family_of_config(raw)
    linear = {"rope_type": "linear", "factor": 2.0}
    assert family.read(raw, {"rope_scaling": linear}).layers[0].rope.kind == "linear"
    newer = {**raw, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    rope = family.read(newer, {"rope_scaling": linear}).layers[0].rope
    assert (rope.kind, rope.base) == ("linear", 5e5)
    nested = {**raw, "text_config": {"max_position_embeddings": 64}}
    assert family.read(nested, {"max_position_embeddings": 128}).max_position == 128
    with pytest.raises(InvalidInputError, match=r"called rope_scalin \(did you mean 'rope_scaling'"):
        family.read(raw, {"rope_scalin": linear})
    with pytest.raises(UnsupportedError, match="mrope"):
        family.read(raw, {"rope_scaling": {"rope_type": "mrope"}})


def test_overrides_reach_the_config_of_a_folder_and_of_a_gguf_file(tmp_path):
    model = tiny.save_tiny(tmp_path, "llama")
    path = tiny.write_tiny_gguf(tmp_path / "tiny.gguf", "llama", model)
    linear = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    for source in (tmp_path, path):
        assert open_checkpoint(str(source), overrides=linear).config.layers[0].rope.kind == "linear"


def test_unknown_code_is_never_run_and_known_architectures_do_not_need_it():
    with pytest.raises(UnsupportedError, match="never runs"):
        family_of_config({"architectures": ["NewForCausalLM"], "auto_map": {"AutoModelForCausalLM": "new.New"}})
    raw = {**BASE, "architectures": ["Phi3ForCausalLM"], "auto_map": {"AutoModelForCausalLM": "phi.Phi3"}}
    assert family_of_config(raw).read(raw).family == "phi3"


def test_a_vocabulary_that_does_not_match_is_named_with_both_sizes(tmp_path):
    tiny.save_tiny(tmp_path, "llama")
    tiny.edit_json(tmp_path / "config.json", vocab_size=100)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight has shape \[96, 32\], expected \[100, 32\]"):
        open_checkpoint(str(tmp_path)).tensors(torch.float32)


def test_a_tokenizer_beyond_the_vocabulary_is_refused_with_every_other_fault(tmp_path):
    tiny.save_tiny(tmp_path, "llama")
    tiny.edit_json(tmp_path / "config.json", eos_token_id=[2, 500])
    vocab = {f"t{i}": i for i in range(90)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="t0"))
    backend.add_tokens(["one", "two", "three", "four", "five", "six", "plain"])  # the last has id 96
    backend.add_special_tokens(["<image>", "<turn>", "<bos>"])
    tokenizer = Tokenizer(backend, special_tokens={"bos_token": "<bos>"}, chat_template="{{ '<turn>' }}")
    checkpoint = open_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError) as error:
        checkpoint.check(tokenizer)
    message = str(error.value)
    assert "(2 faults)" in message and "ends texts with token 500" in message
    assert "3 tokens beyond the model's 96: 'plain', '<turn>', '<bos>'" in message  # nothing writes <image>


def test_a_vocabulary_larger_than_the_tokenizers_is_nothing_unusual(tmp_path):
    tiny.save_tiny(tmp_path, "llama")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    open_checkpoint(str(tmp_path)).check(Tokenizer(backend, special_tokens={}))


def test_a_model_with_another_models_tokenizer_does_not_load(tmp_path):
    tiny.save_tiny(tmp_path / "small", "llama")
    tiny.save_tiny(tmp_path / "large", "llama")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(200)}, unk_token="t0"))
    for name in ("small", "large"):
        backend.save(str(tmp_path / name / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="104 tokens beyond the model's 96: 't96', 't97'"):
        LLM(str(tmp_path / "small"), tokenizer=str(tmp_path / "large"), kv_cache_memory_bytes=8 << 20)


def test_a_fused_matrix_that_is_missing_or_misshapen_is_named_once(tmp_path):
    import safetensors.torch
    import transformers

    config = transformers.Phi3Config(**{**tiny.LLAMA, "pad_token_id": 0})
    transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["model.layers.0.self_attn.qkv_proj.weight"]
    name = "model.layers.1.mlp.gate_up_proj.weight"
    tensors[name] = tensors[name][:100].clone()
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(str(tmp_path)).check()
    message = str(error.value)
    assert "(2 faults)" in message
    assert message.count("qkv_proj") == message.count("gate_up_proj") == 1
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "phi3"
