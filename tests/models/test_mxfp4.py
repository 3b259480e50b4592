"""Weights in MXFP4, as gpt-oss is published: the values that transformers unpacks, and the logits that follow."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from harness.families import VARIANTS, decoder_of, expected_logits, oracle_of
from harness.tiny_model import batch_of, cache_of, feed, random_tokens
from harness.tolerances import LOGITS_FLOAT32
from kvloom.cache.kvcache import KVCache
from kvloom.errors import CheckpointError
from kvloom.models.checkpoint import open_checkpoint
from kvloom.models.compiled import CompiledModel
from kvloom.models.decoder import Decoder
from kvloom.models.loader import load_model
from kvloom.models.model import StepWanted
from kvloom.models.mxfp4 import Mxfp4Tensors
from kvloom.models.safetensors_folder import SafetensorsFolder
from kvloom.spec.store import NATIVE_STORE, SLAB_BYTES

EXPERTS = ("gate_up_proj", "down_proj")


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """Return (folder, oracle): a tiny gpt-oss with random codes for its experts, and the same model in float32."""
    kind, changes = VARIANTS["gpt-oss"]
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    monkeypatch.setitem(VARIANTS, "gpt-oss", (kind, {**changes, **sizes}))
    oracle = oracle_of("gpt-oss")
    torch.manual_seed(3)
    tensors, count = {}, 5
    state = oracle.state_dict()
    for name, value in state.items():
        if not name.endswith(EXPERTS):
            tensors[name] = value.clone()
            continue
        rows, groups = value.shape[2], value.shape[1] // 32
        blocks = torch.randint(256, (count, rows, groups, 16), dtype=torch.uint8)
        scales = torch.randint(121, 126, (count, rows, groups), dtype=torch.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        value.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    oracle.load_state_dict(state)
    oracle.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, oracle


def test_every_value_is_the_one_that_transformers_unpacks(packed):
    folder, oracle = packed
    file = Mxfp4Tensors(SafetensorsFolder(folder))
    for name, value in oracle.state_dict().items():
        assert file.shapes[name] == tuple(value.shape)
        assert torch.equal(file.read(name, torch.float32), value)
        assert torch.equal(file.read(name, torch.bfloat16), value.bfloat16())


def test_every_code_under_every_scale_is_its_value_times_a_power_of_two(tmp_path):
    codes = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()
    scales = torch.tensor([[[0] * 16, [127] * 16, [252] * 16]], dtype=torch.uint8)
    safetensors.torch.save_file({"x_blocks": codes, "x_scales": scales}, tmp_path / "model.safetensors")
    found = Mxfp4Tensors(SafetensorsFolder(tmp_path)).read("x", torch.float32)
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values = magnitudes + [-m for m in magnitudes]
    expected = torch.tensor([values[half] for byte in range(256) for half in (byte & 15, byte >> 4)])
    for row, exponent in enumerate((-127, 0, 125)):
        assert torch.equal(found[0, :, row].double(), expected.double() * 2.0**exponent)


def test_the_logits_are_those_of_transformers(packed):
    folder, oracle = packed
    checkpoint = open_checkpoint(str(folder))
    decoder = Decoder(checkpoint.config, dict(checkpoint.tensors(torch.float32)))
    for chunk in (0, 7):
        tokens = random_tokens(40, 131)
        cache = cache_of(decoder)
        logits = feed(decoder, cache, cache.lanes.open(), tokens, chunk=chunk)
        assert (logits - expected_logits(oracle, tokens)).abs().max() < LOGITS_FLOAT32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_keep_experts_in_four_bits_and_have_the_logits_of_transformers(packed, dtype):
    pytest.importorskip("kvloom.kernels.cpu._ext", reason="the CPU kernels are not built")
    folder, oracle = packed
    checkpoint = open_checkpoint(str(folder))
    model = load_model(checkpoint, dtype, block_size=16, backend="cpu")
    decoded = CompiledModel(checkpoint.config, checkpoint.tensors(dtype), dtype)
    count, hidden, wide, bits = 5, 64, 96, 8 * dtype.itemsize
    weights = checkpoint.config.num_layers * count * 3 * hidden * wide
    assert decoded.num_bytes - model.num_bytes == weights * (bits - 4.25) / 8
    store = NATIVE_STORE[str(dtype).removeprefix("torch.")]
    cache = KVCache(checkpoint.config.kv_spec(16, store), 4 * SLAB_BYTES, 2, dtype, layout="cpu")
    tokens, sequence = random_tokens(40, 131), cache.lanes.open()
    assert cache.lanes.extend(sequence, 40)
    found = model.step(batch_of([(sequence, 0, tokens)]), cache, StepWanted(np.arange(40, dtype=np.int32))).logits
    spread = expected_logits(oracle, tokens).std()
    limit = LOGITS_FLOAT32 if dtype == torch.float32 else 0.2 * spread
    assert (found - expected_logits(oracle, tokens)).abs().max() < limit


def test_parts_that_do_not_go_together_are_all_named(packed):
    folder, _ = packed
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    at = "model.layers.{}.mlp.experts."
    del tensors[at.format(0) + "down_proj_scales"]
    tensors[at.format(1) + "down_proj_scales"] = tensors[at.format(1) + "down_proj_scales"][:, :3].clone()
    tensors[at.format(2) + "gate_up_proj_scales"] = tensors[at.format(2) + "gate_up_proj_scales"].float()
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(str(folder))
    assert all(f"layers.{i}.mlp.experts" in str(error.value) for i in range(3))


def test_weights_that_are_not_packed_load_as_before(tmp_path):
    assert decoder_of(oracle_of("gpt-oss"), tmp_path).config.family == "gpt_oss"
