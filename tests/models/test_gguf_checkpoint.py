"""A model in a GGUF file is the same model as in a folder, and the real ones are what transformers reads."""

import pytest
import torch
from gguf import GGMLQuantizationType as Quant

from harness import tiny
from harness.golden import fingerprint, golden
from kvloom.errors import CheckpointError, UnsupportedError
from kvloom.models.checkpoint import open_checkpoint
from kvloom.spec.decoder import RopeConfig


def tiny_gguf(tmp_path, family, changes=None, **options):
    """Write a tiny model as a GGUF file; return (path, model)."""
    model = tiny.tiny_model(family, **(changes or {}))
    return tiny.write_tiny_gguf(tmp_path / "tiny.gguf", family, model, **options), model


def assert_equals_oracle(checkpoint, model, tolerance):
    """Compare all canonical weights with those of a model of transformers; return how many there were."""
    state, count = model.state_dict(), 0
    names = {name: weight.hf.format(i=layer) for name, layer, weight in checkpoint.family.expected(checkpoint.config)}
    for name, tensor in checkpoint.tensors(torch.float32):
        wanted = state[names[name]]
        if checkpoint.family.name == "gemma3" and wanted.ndim == 1:
            wanted = wanted + 1
        torch.testing.assert_close(
            tensor, wanted, rtol=tolerance, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
        count += 1
    return count


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("llama", {"attention_bias": True}), ("gemma3", {})],
)
def test_weights_and_config_are_those_of_the_same_model_in_a_folder(tmp_path, family, changes):
    path, model = tiny_gguf(tmp_path, family, changes, **({"attention__key_length": 8} if family == "llama" else {}))
    model.config.query_pre_attn_scalar = 16
    model.save_pretrained(tmp_path / "folder")
    from_gguf, from_folder = open_checkpoint(str(path)), open_checkpoint(str(tmp_path / "folder"))
    assert_equals_oracle(from_gguf, model, 1e-6)
    wanted = {**vars(from_folder.config), "norm_eps": pytest.approx(from_folder.config.norm_eps)}
    if family == "gemma3":
        wanted["query_scale"] = 0.25
    assert vars(from_gguf.config) == wanted


def test_quantised_weights_have_the_values_that_they_stand_for(tmp_path):
    path, model = tiny_gguf(tmp_path, "llama", quant=Quant.Q8_0)
    found = dict(open_checkpoint(str(path)).tensors(torch.float32))
    up = model.state_dict()["model.layers.1.mlp.up_proj.weight"]
    assert 0 < (found["layers.1.up"] - up).abs().max() < up.abs().max() / 127


def test_llama_scaling_is_recognised_in_the_divisors_of_the_frequencies(tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    params = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scaled = LlamaConfig(head_dim=64, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, **params})
    divisors = 1e4 ** -(torch.arange(0, 64, 2) / 64) / ROPE_INIT_FUNCTIONS["llama3"](scaled)[0]
    model = tiny.tiny_model("llama", head_dim=64)
    path = tiny.write_tiny_gguf(
        tmp_path / "tiny.gguf", "llama", model, attention__key_length=64, extra={"rope_freqs.weight": divisors.numpy()}
    )
    rope = open_checkpoint(str(path)).config.layers[0].rope
    original = params.pop("original_max_position_embeddings")
    assert (rope.kind, rope.scaling) == ("llama3", pytest.approx({**params, "original": original}))
    tiny.write_tiny_gguf(
        path, "llama", model, attention__key_length=64, extra={"rope_freqs.weight": divisors.numpy() ** 1.1}
    )
    with pytest.raises(UnsupportedError, match="fit no supported kind"):
        open_checkpoint(str(path))


def test_linear_scaling_is_read_and_gemma_applies_it_to_global_layers_only(tmp_path):
    path, _ = tiny_gguf(tmp_path, "gemma3", rope__scaling__type="linear", rope__scaling__factor=8.0)
    layers = open_checkpoint(str(path)).config.layers
    assert layers[5].rope == RopeConfig(1e6, "linear", {"factor": 8.0})
    assert layers[0].rope == RopeConfig(1e4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rope__scaling__type": "resonance", "rope__scaling__factor": 4.0}, "resonance"),
        ({"rope__dimension_count": 4}, "only 4 of the 8"),
        ({"attention__key_length": 8, "attention__value_length": 16}, "keys have 8 elements"),
    ],
)
def test_what_the_metadata_ask_for_and_kvloom_lacks_is_refused(tmp_path, options, reason):
    path, _ = tiny_gguf(tmp_path, "llama", **options)
    with pytest.raises(UnsupportedError, match=reason):
        open_checkpoint(str(path))


def test_missing_tensors_are_named_by_their_gguf_names(tmp_path):
    path, _ = tiny_gguf(tmp_path, "llama", skip=("blk.1.ffn_up.weight", "output_norm.weight"))
    with pytest.raises(CheckpointError, match=r"2 faults.*output_norm\.weight is missing; blk\.1\.ffn_up\.weight"):
        open_checkpoint(str(path)).tensors(torch.float32)


def test_the_folder_of_a_gguf_file_points_to_the_file(tmp_path):
    path, _ = tiny_gguf(tmp_path, "llama")
    with pytest.raises(CheckpointError, match=rf"config\.json.*path of {path.name}"):
        open_checkpoint(str(tmp_path))


def test_a_truncated_model_does_not_open(tmp_path):
    path, _ = tiny_gguf(tmp_path, "llama")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(str(path))


def assert_golden_weights(checkpoint, model, tolerance):
    """Compare size and projection of all weights with those that transformers reads; return how many there are."""
    expected, gemma = golden(model)["weights"], model == "gemma"
    names = {name: weight.hf.format(i=layer) for name, layer, weight in checkpoint.family.expected(checkpoint.config)}
    for name, tensor in checkpoint.tensors(torch.float32):
        wanted = expected.pop(names[name])
        stored = tensor - 1 if gemma and tensor.ndim == 1 else tensor
        assert fingerprint(stored) == pytest.approx(wanted, abs=tolerance * wanted[0]), name
    assert expected == {}
    return len(names)


@pytest.mark.real_model
def test_the_weights_of_smollm2_are_what_transformers_reads(smollm2_path):
    checkpoint = open_checkpoint(str(smollm2_path))
    assert assert_golden_weights(checkpoint, "smollm2", 1e-9) == 272
    config = checkpoint.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.max_position, config.layers[0].rope, config.eos_token_ids) == (8192, RopeConfig(1e5), (2, 0))


@pytest.mark.real_model
def test_the_weights_of_gemma_are_what_transformers_reads(gemma_path):
    checkpoint = open_checkpoint(str(gemma_path))
    assert assert_golden_weights(checkpoint, "gemma", 1e-6) == 236
    config = checkpoint.config
    local = [layer % 6 != 5 for layer in range(18)]
    assert [layer.window for layer in config.layers] == [512 if each else None for each in local]
    assert [layer.rope.base for layer in config.layers] == [1e4 if each else 1e6 for each in local]
    assert (config.query_scale, config.embedding_scale) == (256**-0.5, 640**0.5)
