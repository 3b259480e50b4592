"""Families whose GGUF files hold other layouts than their safetensors: fused, turned, regrouped, experts.

Tensors are named by the `gguf` package's own tables and laid out as converters lay them out.
"""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quant

from harness.families import VARIANTS, expected_logits, oracle_of
from harness.gguf_families import write
from harness.tiny_model import batch_of, cache_of, feed, random_tokens
from harness.tolerances import LOGITS_FLOAT32
from kvloom.cache.kvcache import KVCache
from kvloom.errors import CheckpointError, UnsupportedError
from kvloom.models.checkpoint import open_checkpoint
from kvloom.models.compiled import CompiledModel
from kvloom.models.decoder import Decoder
from kvloom.models.loader import load_model
from kvloom.models.model import StepWanted
from kvloom.models.mxfp4 import Mxfp4Weight
from kvloom.spec.families import family_of_gguf
from kvloom.spec.store import NATIVE_STORE, SLAB_BYTES

ARCHITECTURES = {
    "gpt2": "gpt2", "gpt2, untied": "gpt2", "gpt-bigcode": "starcoder", "gpt-neox": "gptneox",
    "gpt-neox, one after the other": "gptneox", "gpt-neox, whole heads": "gptneox", "falcon 7b": "falcon",
    "falcon 40b": "falcon", "falcon 11b": "falcon", "bloom": "bloom", "bloom, six heads": "bloom", "mpt": "mpt",
    "mpt, clipped": "mpt", "smollm3": "smollm3", "mixtral": "llama", "qwen3-moe": "qwen3moe", "gpt-oss": "gpt-oss",
}  # fmt: skip
CHANGES = {  # what a GGUF file cannot say is as converters and readers of it take it to be
    "gpt2, untied": ("GPT2", {"tie_word_embeddings": False}),
    "mpt, clipped": ("Mpt", {"attn_config": {"clip_qkv": 0.8}}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 16, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True,
                               "moe_intermediate_size": 40}),
}  # fmt: skip


def decoder_of(path):
    """Return the decoder of a GGUF file, in float32."""
    checkpoint = open_checkpoint(str(path))
    return Decoder(checkpoint.config, dict(checkpoint.tensors(torch.float32)))


def logits_of(decoder, tokens):
    """Return the logits [n, V] of tokens in one piece."""
    cache = cache_of(decoder)
    return feed(decoder, cache, cache.lanes.open(), tokens)


@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_a_gguf_file_has_the_logits_of_the_model_that_was_written(variant, tmp_path, monkeypatch):
    if variant in CHANGES:
        monkeypatch.setitem(VARIANTS, variant, CHANGES[variant])
    oracle = oracle_of(variant)
    decoder = decoder_of(write(tmp_path / "tiny.gguf", ARCHITECTURES[variant], oracle))
    for length in (28, 70):
        tokens = random_tokens(length, 131)
        assert (logits_of(decoder, tokens) - expected_logits(oracle, tokens)).abs().max() < LOGITS_FLOAT32


@pytest.mark.parametrize("quant", [Quant.Q8_0, Quant.Q4_0, Quant.Q5_1, Quant.BF16])
def test_quantised_parts_of_fused_and_stacked_matrices_have_the_values_of_the_gguf_package(
    quant, tmp_path, monkeypatch
):
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32}
    kind, changes = CHANGES["qwen3-moe"]
    monkeypatch.setitem(VARIANTS, "qwen3-moe", (kind, {**changes, **sizes}))
    for variant, stored, weights in (
        ("qwen3-moe", "blk.1.ffn_gate_exps.weight", ["layers.1.experts_gate"]),
        ("gpt-neox", "blk.1.attn_qkv.weight", ["layers.1.v"]),
    ):
        path = write(tmp_path / f"{variant}.gguf", ARCHITECTURES[variant], oracle_of(variant), quant)
        found = dict(open_checkpoint(str(path)).tensors(torch.float32))
        [tensor] = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == stored]
        assert tensor.tensor_type == quant
        whole = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        parts = torch.cat([found[name] for name in weights])
        assert torch.equal(parts.flatten(), whole.flatten()[-parts.numel() :])


def test_k_quants_of_a_fused_matrix_give_each_part_its_own_rows(tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "gpt2", ("GPT2", {"n_embd": 256, "n_layer": 1}))
    oracle = oracle_of("gpt2")
    path = write(tmp_path / "plain.gguf", "gpt2", oracle)
    rng = np.random.default_rng(0)
    for quant in (Quant.Q4_K, Quant.Q5_K, Quant.Q6_K):
        block_bytes = gguf.GGML_QUANT_SIZES[quant][1]
        raw = rng.integers(0, 256, (768, block_bytes), np.uint8)
        scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        raw[:, -2:] = scale  # the scale of a block: at its end in Q6_K, at its start in the others, with the minimum
        raw[:, :2], raw[:, 2:4] = scale, scale
        other = tmp_path / f"{quant.name}.gguf"
        rewrite(path, other, "blk.0.attn_qkv.weight", raw, quant)
        found = dict(open_checkpoint(str(other)).tensors(torch.float32))
        whole = torch.from_numpy(gguf.dequantize(raw, quant).astype(np.float32)).reshape(768, 256)
        assert torch.isfinite(whole).all() and whole.std() > 0
        assert torch.equal(torch.cat([found[f"layers.0.{name}"] for name in "qkv"]), whole)


def rewrite(source, target, name, raw, quant):
    """Copy a GGUF file with the raw blocks of one tensor put in."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "gpt2")
    for key, field in reader.fields.items():
        if key.startswith("gpt2."):
            add = writer.add_float32 if field.types[0] == gguf.GGUFValueType.FLOAT32 else writer.add_uint32
            add(key, field.contents())
    for tensor in reader.tensors:
        if tensor.name == name:
            writer.add_tensor(name, raw, raw_dtype=quant)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_experts_in_mxfp4_have_the_values_of_the_gguf_package(tmp_path, monkeypatch):
    kind, changes = VARIANTS["gpt-oss"]
    monkeypatch.setitem(VARIANTS, "gpt-oss", (kind, {**changes, "hidden_size": 64, "intermediate_size": 96}))
    path = write(tmp_path / "tiny.gguf", "gpt-oss", oracle_of("gpt-oss"), Quant.MXFP4)
    found = dict(open_checkpoint(str(path)).tensors(torch.float32))
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name.startswith("blk.2.ffn_") and tensor.name.endswith("_exps.weight"):
            assert tensor.tensor_type == Quant.MXFP4
            whole = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
            name = tensor.name.removeprefix("blk.2.ffn_").removesuffix("_exps.weight")
            part = found[f"layers.2.experts_{name}"]
            assert torch.equal(part, whole.reshape(part.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_keep_experts_of_gguf_files_in_four_bits(dtype, tmp_path, monkeypatch):
    pytest.importorskip("kvloom.kernels.cpu._ext", reason="the CPU kernels are not built")
    kind, changes = VARIANTS["gpt-oss"]
    monkeypatch.setitem(VARIANTS, "gpt-oss", (kind, {**changes, "hidden_size": 64, "intermediate_size": 96}))
    path = write(tmp_path / "tiny.gguf", "gpt-oss", oracle_of("gpt-oss"), Quant.MXFP4)
    checkpoint = open_checkpoint(str(path))
    kept = load_model(checkpoint, dtype, block_size=16, backend="cpu")
    decoded = CompiledModel(checkpoint.config, checkpoint.tensors(dtype), dtype)
    weights = checkpoint.config.num_layers * 5 * 3 * 64 * 96
    assert decoded.num_bytes - kept.num_bytes == weights * (8 * dtype.itemsize - 4.25) / 8
    stored = [weight for name, weight in checkpoint.packed_tensors(dtype) if name == "layers.2.experts_down"]
    assert [type(weight) for weight in stored] == [Mxfp4Weight]
    store = NATIVE_STORE[str(dtype).removeprefix("torch.")]
    cache = KVCache(checkpoint.config.kv_spec(16, store), 4 * SLAB_BYTES, 2, dtype, layout="cpu")
    tokens, sequence = random_tokens(40, 131), cache.lanes.open()
    assert cache.lanes.extend(sequence, 40)
    found = kept.step(batch_of([(sequence, 0, tokens)]), cache, StepWanted(np.arange(40, dtype=np.int32))).logits
    definition = Decoder(checkpoint.config, dict(checkpoint.tensors(torch.float32)))
    eager = cache_of(definition)
    expected = feed(definition, eager, eager.lanes.open(), tokens)
    limit = LOGITS_FLOAT32 if dtype == torch.float32 else 0.2 * expected.std()
    assert (found - expected).abs().max() < limit


def test_experts_decide_between_two_families_of_one_architecture():
    assert family_of_gguf("llama").name == "llama" and family_of_gguf("llama", has_experts=True).name == "mixtral"
    with pytest.raises(UnsupportedError, match="gptneox"):
        family_of_gguf("gptneoy")


def test_experts_in_a_family_without_them_and_learned_positions_in_mpt_are_refused(tmp_path):
    path = write(tmp_path / "a.gguf", "smollm3", oracle_of("smollm3"), expert_count=4)
    with pytest.raises(UnsupportedError, match="experts are not supported"):
        open_checkpoint(str(path))
    path = write(tmp_path / "b.gguf", "mpt", oracle_of("mpt"), **{"attention.max_alibi_bias": 0.0})
    with pytest.raises(UnsupportedError, match="positions are learned"):
        open_checkpoint(str(path))


def test_a_fused_matrix_that_does_not_fit_is_named_once(tmp_path):
    path = write(tmp_path / "a.gguf", "bloom", oracle_of("bloom"), **{"attention.head_count": 3})
    checkpoint = open_checkpoint(str(path))
    checkpoint.check()  # 3 heads of 16 take the same room
    path = write(tmp_path / "b.gguf", "bloom", oracle_of("bloom"), block_count=4)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(str(path)).check()
    assert str(error.value).count("blk.3.attn_qkv.weight") == 1
