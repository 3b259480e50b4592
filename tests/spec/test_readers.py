"""Shapes and weight bytes from files: config.json, safetensors headers, GGUF; and what is refused."""

import json
import struct

import pytest

from kvloom.errors import CheckpointError, InvalidInputError, ModelNotFoundError, UnsupportedError
from kvloom.spec.catalogue import catalogue_entry, catalogue_spec
from kvloom.spec.config_json import read_config, spec_from_config
from kvloom.spec.families import family_of_config
from kvloom.spec.gguf_config import spec_of_gguf
from kvloom.spec.gguf_header import TENSOR_TYPES, GGUFHeader
from kvloom.spec.hardware import find_device
from kvloom.spec.hypothetical import Hypothesis, attention_variants
from kvloom.spec.safetensors_header import read_header, read_weight_files

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 50, "torch_dtype": "float16",
}  # fmt: skip


def write_safetensors(path, tensors):
    """Write a safetensors file of zeros with the given (dtype, shape, bytes) by name."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))


def test_weight_bytes_are_added_up_over_the_files_that_the_index_names(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"x": ("BF16", [3, 5], 30), "s": ("F32", [2], 8)})
    write_safetensors(tmp_path / "b.safetensors", {"y": ("BF16", [7], 14)})
    write_safetensors(tmp_path / "other.safetensors", {"z": ("BF16", [7], 14)})
    index = {"weight_map": {"x": "a.safetensors", "s": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = read_weight_files(tmp_path)
    assert (found.num_bytes, found.num_elements, found.dtype) == (52, 24, "bfloat16")


def test_a_shard_that_is_missing_is_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lacks a\.safetensors"):
        read_weight_files(tmp_path)


@pytest.mark.parametrize("content", [b"", b"123", struct.pack("<Q", 1 << 40), struct.pack("<Q", 2) + b"[]x",
                                     struct.pack("<Q", 8) + b"not json"])  # fmt: skip
def test_a_damaged_safetensors_header_is_a_checkpoint_error(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError):
        read_header(tmp_path / "a.safetensors")


def test_a_safetensors_file_that_was_cut_off_is_a_checkpoint_error(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": ("BF16", [30], 60)})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="damaged"):
        read_header(path)


def write_gguf(path, arch="llama", **values):
    """Write a GGUF file with two tensors through the gguf package."""
    gguf = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(path, arch)
    facts = {"block_count": 2, "embedding_length": 64, "attention.head_count": 4, "attention.head_count_kv": 2,
             "feed_forward_length": 96, "context_length": 128, **values}  # fmt: skip
    for key, value in facts.items():
        if isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        else:
            writer.add_uint32(f"{arch}.{key}", value)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc"])
    writer.add_tensor("token_embd.weight", numpy.zeros((50, 64), dtype=numpy.float16))
    writer.add_tensor("blk.0.ffn_up.weight", numpy.zeros((96, 34 * 2), dtype=numpy.uint8),
                      raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_shape_and_exact_tensor_bytes(tmp_path):
    write_gguf(tmp_path / "m.gguf", **{"attention.head_count_kv": [2, 2]})
    header = GGUFHeader(tmp_path / "m.gguf")
    assert header.num_bytes == 50 * 64 * 2 + 96 * 64 // 32 * 34
    assert header.num_elements == 50 * 64 + 96 * 64
    spec = spec_of_gguf(header, "m")
    assert (spec.weight_bytes, spec.file_bytes) == (2 * header.num_elements, header.num_bytes)
    assert spec.kv_spec(16, "bf16").bytes_per_token == 2 * 2 * 2 * 16 * 2
    assert (spec.vocab_size, spec.tie_embeddings, spec.max_position) == (50, True, 128)


def test_a_gguf_file_that_was_cut_off_says_so(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:150])
    with pytest.raises(CheckpointError, match="truncated"):
        GGUFHeader(path)


def test_a_file_that_is_no_gguf_says_so(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        GGUFHeader(tmp_path / "m.gguf")


def test_an_unknown_gguf_architecture_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", arch="lama")
    with pytest.raises(UnsupportedError, match="did you mean 'llama'"):
        spec_of_gguf(GGUFHeader(tmp_path / "m.gguf"), "m")


@pytest.mark.parametrize("name", ["opt", "gptj", "mistral3", "gemma4", "jamba", "OPTForCausalLM"])
def test_another_architecture_is_not_taken_for_a_slip_of_the_pen(name):
    key, value = ("architectures", [name]) if "For" in name else ("model_type", name)
    with pytest.raises(UnsupportedError) as caught:
        family_of_config({key: value})
    assert "did you mean" not in str(caught.value)
    with pytest.raises(ModelNotFoundError) as caught:
        catalogue_spec(name)
    assert "did you mean" not in str(caught.value)


def test_a_gguf_file_of_latent_attention_is_planned(tmp_path):
    facts = {"attention.q_lora_rank": 12, "attention.kv_lora_rank": 16, "rope.dimension_count": 4, "expert_count": 8,
             "attention.key_length": 12, "attention.value_length": 8, "expert_used_count": 2, "expert_shared_count": 1,
             "expert_feed_forward_length": 16, "leading_dense_block_count": 1}  # fmt: skip
    write_gguf(tmp_path / "m.gguf", arch="deepseek2", **facts)
    spec = spec_of_gguf(GGUFHeader(tmp_path / "m.gguf"), "m")
    assert spec.kv_spec(16, "bf16").bytes_per_token == 2 * 32 * 2  # 16 + 4 elements, in multiples of 16
    assert spec.decoder is None


def test_blocks_of_every_tensor_type_have_the_sizes_of_the_gguf_package():
    gguf = pytest.importorskip("gguf")
    sizes = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert {number: TENSOR_TYPES[number] for number in sizes if number in TENSOR_TYPES} == {
        number: size for number, size in sizes.items() if number in TENSOR_TYPES
    }


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"model_type": "lama"}, UnsupportedError, "did you mean 'llama'"),
        ({"model_type": "lama"}, UnsupportedError, "--layers N --heads N"),
        ({"model_type": "vit", "image_size": 224}, UnsupportedError, "vision model"),
        ({"model_type": "t5", "is_encoder_decoder": True}, UnsupportedError, "encoder"),
        ({"model_type": None}, InvalidInputError, "names no model_type"),
        ({"num_key_value_heads": 3}, CheckpointError, "num_attention_heads is 4, expected a multiple of 3 KV heads"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, CheckpointError, "expected a multiple of 7 heads"),
        ({"num_hidden_layers": -2}, CheckpointError, "num_hidden_layers is -2, expected a positive integer"),
        ({"num_hidden_layers": "2"}, CheckpointError, "num_hidden_layers is '2'"),
        ({"hidden_size": None}, CheckpointError, "hidden_size is missing"),
        ({"model_type": "mamba", "hidden_size": None}, InvalidInputError, "has no hidden_size"),
        ({"torch_dtype": "float12"}, InvalidInputError, "float12"),
        ({"quantization_config": {"quant_method": "hqq"}}, UnsupportedError, "'hqq' is not understood"),
        ({"model_type": "gemma3n_text", "layer_types": ["chunked"] * 2}, InvalidInputError, "'chunked'"),
        ({"model_type": "gemma3_text", "layer_types": ["full_attention"]}, CheckpointError, "a list of 2 names"),
    ],
)
def test_a_config_that_is_not_understood_is_refused_with_the_reason(change, error, words):
    with pytest.raises(error) as caught:
        spec_from_config({**LLAMA, **change}, "m")
    assert words in str(caught.value)


def test_what_a_family_cannot_run_is_planned_with_every_reason():
    spec = spec_from_config({**LLAMA, "model_type": "gemma3_text", "use_bidirectional_attention": True,
                             "layer_types": ["chunked"] * 2}, "m")  # fmt: skip
    assert spec.refused == ("use_bidirectional_attention True", "layers of type 'chunked'")


def test_an_mpt_whose_heads_share_keys_is_planned_with_those_though_it_is_refused():
    config = {"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2, "attn_config": {"kv_n_heads": 1}}
    spec = spec_from_config(config, "m")
    assert spec.refused == ("attn_config.kv_n_heads 1",)
    assert spec.kv_spec(16, "bf16").bytes_per_token == 2 * 2 * 16 * 2


@pytest.mark.parametrize("text", ["[1]", "{", "\x00"])
def test_a_file_that_is_no_config_is_a_checkpoint_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError):
        read_config(tmp_path / "config.json")


def test_a_multimodal_wrapper_is_planned_by_its_text_decoder():
    inner = catalogue_entry("gemma-3-4b")["config"]
    wrapped = {"model_type": "gemma3", "text_config": inner, "vision_config": {"hidden_size": 1152}}
    spec = spec_from_config(wrapped, "m")
    assert spec.layer_kv == catalogue_spec("gemma-3-4b").layer_kv
    assert any("vision" in note for note in spec.notes)


def test_an_older_multimodal_config_is_planned_by_the_entries_of_its_text_decoder():
    inner = {**catalogue_entry("qwen2.5-7b")["config"], "model_type": "qwen2_5_vl"}
    spec = spec_from_config({**inner, "vision_config": {"hidden_size": 1280}}, "m")
    assert spec.layer_kv == catalogue_spec("qwen2.5-7b").layer_kv
    assert (spec.num_params, spec.decoder) == (catalogue_spec("qwen2.5-7b").num_params, None)
    assert any("vision" in note for note in spec.notes)


@pytest.mark.parametrize(
    "quantised, bits",
    [({"quant_method": "mxfp4"}, 4.25), ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128)],
)
def test_quantised_checkpoints_count_their_scales(quantised, bits):
    spec = spec_from_config({**LLAMA, "quantization_config": quantised}, "m")
    assert spec.weight_format.bits == bits


def test_the_catalogue_finds_ids_and_aliases_in_any_case_and_names_the_nearest():
    assert catalogue_spec("META-LLAMA/llama-2-7B-hf").name == "llama-2-7b"
    assert catalogue_spec("smollm2").name == "smollm2-135m"
    with pytest.raises(ModelNotFoundError, match="did you mean 'llama-2-7b'"):
        catalogue_spec("lama-2-7b")


@pytest.mark.parametrize(
    "numbers, words",
    [
        ({"layers": 0, "heads": 4}, "--layers is 0"),
        ({"layers": 2, "heads": 4, "kv_heads": 3}, "not divisible"),
        ({"layers": 2, "heads": 4, "kv_rank": 64}, "both --kv-rank and --rope-dim"),
        ({"layers": 2, "heads": 4, "kv_rank": 64, "rope_dim": 8, "kv_heads": 2}, "contradict"),
        ({"layers": 2, "heads": 4, "global_every": 2}, "give --window too"),
        ({"layers": 2, "heads": 4, "yoco": True, "share_kv": 2}, "contradict"),
        ({"layers": 2, "heads": 3, "hidden": 64}, "not divisible"),
        ({"layers": 2, "heads": 4, "experts": 2, "experts_per_token": 3}, "exceeds"),
    ],
)
def test_contradictory_numbers_of_a_hypothetical_model_are_refused(numbers, words):
    with pytest.raises(InvalidInputError) as caught:
        Hypothesis(**numbers).build()
    assert words in str(caught.value)


def test_attention_variants_of_llama_2_7b_have_the_known_bytes_per_token():
    found = {
        name: v.kv_spec(16, "bf16").bytes_per_token for name, v in attention_variants(catalogue_spec("llama-2-7b"))
    }
    assert found == {"MHA (the model)": 524_288, "GQA-8": 131_072, "MQA": 16_384, "MLA (512+64)": 36_864}


def test_devices_are_found_by_name_and_memory_may_be_given():
    assert find_device("H100").bandwidth == 3.35e12
    assert find_device("cpu:64GiB").memory_bytes == 64 << 30
    with pytest.raises(InvalidInputError, match="did you mean 'h100'"):
        find_device("h-1000")


def test_devices_have_the_memory_that_a_process_can_use():
    usable = {"l4": 22.5, "l40s": 45.0, "h100": 79.65, "a10": 22.5, "rtx5090": 31.8}
    assert {name: round((find_device(name).memory_bytes or 0) / 2**30, 2) for name in usable} == {
        name: pytest.approx(gib, abs=0.05) for name, gib in usable.items()
    }


def test_a_device_of_another_name_is_one_of_its_own_where_its_memory_is_given():
    device = find_device("wafer:32GiB")
    assert (device.memory_bytes, device.bandwidth) == (32 << 30, None)
    with pytest.raises(InvalidInputError, match="NAME:32GiB"):
        find_device("wafer")
    with pytest.raises(InvalidInputError, match="did you mean 'h100'"):
        find_device("h1o0:80GiB")


def test_bandwidth_and_peak_of_any_device_may_be_given():
    device = find_device("wafer:32GiB").with_speed(bandwidth=1e12, peak=2e14)
    assert (device.bandwidth, device.peak("bfloat16"), device.peak("float8_e4m3fn")) == (1e12, 2e14, 2e14)
    assert device.source.endswith("bandwidth as given; peak as given")
    with pytest.raises(InvalidInputError, match="--peak is -1"):
        device.with_speed(peak=-1.0)
