"""A folder with safetensors gives the weights that transformers gives, or names everything that is wrong with it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import tiny
from kvloom.errors import CheckpointError, InvalidInputError, ModelNotFoundError, UnsupportedError
from kvloom.models.checkpoint import open_checkpoint


def weights(checkpoint, dtype=torch.float32):
    """Return all canonical tensors by name."""
    return dict(checkpoint.tensors(dtype))


def assert_same_weights(checkpoint, model):
    """Compare the canonical weights with a model of transformers, by the names that the family gives them."""
    state, found = model.state_dict(), weights(checkpoint)
    used = set()
    for name, layer, weight in checkpoint.family.expected(checkpoint.config):
        source = weight.hf.format(i=layer)
        used.add(source)
        wanted = state[source] + 1 if weight.is_norm and checkpoint.family.name == "gemma3" else state[source]
        torch.testing.assert_close(found.pop(name), wanted, rtol=0, atol=0)
    assert found == {}
    assert set(state) - used <= {"lm_head.weight"}


def rewrite(folder, change, name="model.safetensors"):
    """Change the tensors of a safetensors file with a function on their dict."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


@pytest.fixture
def llama(tmp_path):
    """Folder of a tiny Llama whose embeddings are not tied."""
    tiny.save_tiny(tmp_path, "llama")
    return tmp_path


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True}),
        ("llama", {"head_dim": 12}),
        ("gemma3", {}),
        ("gemma3", {"tie_word_embeddings": False}),
    ],
)
def test_the_weights_are_those_that_transformers_saved(tmp_path, family, changes):
    model = tiny.save_tiny(tmp_path, family, **changes)
    assert_same_weights(open_checkpoint(str(tmp_path)), model)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_shards_give_the_same_weights_as_one_file(tmp_path, family):
    model = tiny.save_tiny(tmp_path, family, shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_weights(open_checkpoint(str(tmp_path)), model)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_multimodal_checkpoint_is_found_and_the_rest_ignored(tmp_path, prefix):
    model = tiny.save_tiny(tmp_path, "gemma3")

    def wrap(tensors):
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)
        tensors["vision_tower.patch.weight"] = torch.zeros(2)
        tensors["multi_modal_projector.weight"] = torch.zeros(2)

    rewrite(tmp_path, wrap)
    assert_same_weights(open_checkpoint(str(tmp_path)), model)


def test_matrices_come_in_the_asked_dtype_and_norms_in_float32(llama):
    found = weights(open_checkpoint(str(llama)), torch.bfloat16)
    exact = weights(open_checkpoint(str(llama)))
    assert found["layers.0.q"].dtype == torch.bfloat16
    assert torch.equal(found["layers.0.q"], exact["layers.0.q"].bfloat16())
    assert torch.equal(found["layers.0.attn_norm"], exact["layers.0.attn_norm"])


def test_changing_a_tensor_does_not_change_the_file(llama):
    checkpoint = open_checkpoint(str(llama))
    weights(checkpoint)["embed"].zero_()
    assert weights(checkpoint)["embed"].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_borrowed_tensors_have_the_same_values_and_names(llama, dtype):
    checkpoint = open_checkpoint(str(llama))
    borrowed = dict(checkpoint.tensors(dtype, borrowed=True))
    fresh = dict(checkpoint.tensors(dtype))
    assert borrowed.keys() == fresh.keys()
    assert all(borrowed[name].dtype == fresh[name].dtype for name in fresh)
    assert all(torch.equal(borrowed[name], fresh[name]) for name in fresh)


def test_all_missing_unexpected_and_misshapen_tensors_are_named_before_anything_loads(llama):
    def damage(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 31)
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(1)

    rewrite(llama, damage)
    with pytest.raises(CheckpointError) as fault:
        open_checkpoint(str(llama)).tensors(torch.float32)
    for line in (
        "4 faults",
        "model.norm.weight is missing",
        "model.layers.1.mlp.up_proj.weight is missing",
        "model.layers.0.self_attn.q_proj.weight has shape [32, 31], expected [32, 32]",
        "model.layers.2.mlp.up_proj.weight is unexpected",
    ):
        assert line in str(fault.value)


def test_rotary_frequencies_in_old_checkpoints_are_harmless(llama):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    rewrite(llama, add)
    open_checkpoint(str(llama)).check()


def test_a_stored_copy_of_tied_embeddings_is_not_loaded_twice(tmp_path):
    tiny.save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert "lm_head" not in weights(open_checkpoint(str(tmp_path)))


def test_embeddings_declared_tied_but_stored_differently_are_not_tied(tmp_path):
    tiny.save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}))
    checkpoint = open_checkpoint(str(tmp_path))
    assert not checkpoint.config.tie_embeddings
    found = weights(checkpoint)
    assert torch.equal(found["lm_head"], found["embed"] * 2)


def test_ends_of_generation_config_and_config_are_united(llama):
    tiny.edit_json(llama / "config.json", eos_token_id=[2, 5])
    tiny.edit_json(llama / "generation_config.json", eos_token_id=[7, 2], temperature=0.6)
    checkpoint = open_checkpoint(str(llama))
    assert checkpoint.config.eos_token_ids == (2, 5, 7)
    assert checkpoint.generation_config["temperature"] == 0.6


@pytest.mark.parametrize("num_bytes", [0, 5, 100, -1])
def test_a_truncated_safetensors_file_is_a_checkpoint_error(llama, num_bytes):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        open_checkpoint(str(llama))


def test_a_missing_shard_is_named(tmp_path):
    tiny.save_tiny(tmp_path, "llama", shard_size="10KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        open_checkpoint(str(tmp_path))


def test_a_tensor_of_the_index_that_no_shard_has_is_named(tmp_path):
    tiny.save_tiny(tmp_path, "llama", shard_size="10KB")
    shard = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]["model.norm.weight"]
    rewrite(tmp_path, lambda tensors: tensors.pop("model.norm.weight"), shard)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        open_checkpoint(str(tmp_path))


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    tiny.save_tiny(tmp_path, "llama", shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-00001', '"../model-00001'))
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_checkpoint(str(tmp_path))


def test_pickled_weights_are_never_opened(llama):
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is pickled"):
        open_checkpoint(str(llama))


def test_weights_of_a_type_that_cannot_be_read_are_named(llama):
    rewrite(llama, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is stored as I8"):
        open_checkpoint(str(llama)).check()


@pytest.mark.parametrize("text", [None, "{", "[1]", '{"hidden_size": 3}'])
def test_a_missing_or_damaged_config_is_a_checkpoint_error(llama, text):
    (llama / "config.json").unlink()
    if text is not None:
        (llama / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(str(llama))


def test_an_unknown_architecture_is_refused(llama):
    tiny.edit_json(llama / "config.json", architectures=["MambaForCausalLM"])
    with pytest.raises(UnsupportedError, match="MambaForCausalLM"):
        open_checkpoint(str(llama))


@pytest.mark.parametrize("name", ["no-such-model", "smolm2", "./nowhere/model.gguf", ""])
def test_a_model_that_is_nowhere_is_not_found(name, llama, monkeypatch):
    monkeypatch.chdir(llama)
    with pytest.raises(ModelNotFoundError, match=r"smollm2.*owner/name"):
        open_checkpoint(name)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"\.gguf file"):
        open_checkpoint(str(tmp_path / "model.bin"))


def test_a_revision_is_only_for_the_hub(llama):
    with pytest.raises(InvalidInputError, match="local path"):
        open_checkpoint(str(llama), revision="main")
