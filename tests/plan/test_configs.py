"""Configs of every kind against K/V and state bytes that are computed from their raw entries here."""

import json
from pathlib import Path

import pytest

from kvloom.spec.config_json import spec_from_config

ENTRIES = json.loads((Path(__file__).parent / "data" / "configs.json").read_text(encoding="utf-8"))
CONFIGS = {entry["config"]["model_type"]: entry["config"] for entry in ENTRIES}


def text_of(config):
    """Return the entries of the innermost text decoder."""
    while isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    return config


def layers_of(config):
    """Return how many layers there are."""
    names = config.get("layers_block_type")
    return len(names) if names else first_of(config, "num_hidden_layers", "n_layer")


def attending(config):
    """Return the layers that cache K and V of their own."""
    count = layers_of(config)
    kinds = config.get("layer_types") or config.get("layers_block_type") or ["full_attention"] * count
    if "attn_layer_period" in config:
        kinds = ["full_attention" if i % config["attn_layer_period"] == config["attn_layer_offset"] else "mamba"
                 for i in range(count)]  # fmt: skip
    if "attn_layer_indices" in config:
        kinds = ["full_attention" if i in config["attn_layer_indices"] else "mamba" for i in range(count)]
    own = count - config.get("num_kv_shared_layers", 0)
    return [i for i in range(own) if kinds[i].endswith("attention") and kinds[i] != "linear_attention"]


def first_of(entries, *keys):
    """Return the first of `keys` that is there, 0 where none is."""
    return next((entries[key] for key in keys if key in entries), 0)


def bytes_per_token(config):
    """Return the K/V bytes of a token in 16 bit; rows are padded to 16 elements."""
    if config["model_type"] in ("mamba", "falcon_mamba", "mamba2"):
        return 0
    total = 0
    for i in attending(config):
        own = {**config, **{int(k): v for k, v in config.get("per_layer_config", {}).items()}.get(i, {})}
        if "kv_lora_rank" in own:
            total += 2 * (own["kv_lora_rank"] + own["qk_rope_head_dim"] + own.get("index_head_dim", 0))
            continue
        heads = first_of(own, "num_attention_heads", "n_head")
        size = own.get("head_dim") or first_of(own, "hidden_size", "n_embd") // heads
        groups = own.get("num_key_value_heads", 1 if own.get("multi_query") else heads)
        total += 2 * 2 * groups * -(-size // 16) * 16
    return total


def state_bytes(config):
    """Return the bytes of recurrent state of a request in float32, convolutions as wide as their kernels."""
    kind = config["model_type"]
    recurrent = layers_of(config) - len(attending(config))
    hidden = config.get("hidden_size", 0)
    if kind in ("mamba", "falcon_mamba"):
        inner = config["intermediate_size"]
        return 4 * layers_of(config) * inner * (config["state_size"] + config["conv_kernel"])
    if kind == "jamba":
        inner = config["mamba_expand"] * hidden
        return 4 * recurrent * inner * (config["mamba_d_state"] + config["mamba_d_conv"])
    if kind in ("mamba2", "falcon_h1", "bamba", "granitemoehybrid", "nemotron_h"):
        heads = first_of(config, "mamba_n_heads", "mamba_num_heads", "num_heads")
        size = first_of(config, "mamba_d_head", "mamba_head_dim", "head_dim")
        state = first_of(config, "mamba_d_state", "ssm_state_size", "state_size")
        groups, kernel = first_of(config, "mamba_n_groups", "n_groups"), first_of(config, "mamba_d_conv", "conv_kernel")
        if kind == "nemotron_h":
            recurrent = sum(name == "linear_attention" for name in config["layers_block_type"])
        elif kind in ("mamba2", "falcon_h1"):
            recurrent = layers_of(config)
        return 4 * recurrent * (heads * size * state + (heads * size + 2 * groups * state) * kernel)
    if "linear_key_head_dim" in config:
        keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
        values = config["linear_num_value_heads"] * config["linear_value_head_dim"]
        channels = 2 * keys + values
        return 4 * recurrent * (config["linear_key_head_dim"] * values + channels * config["linear_conv_kernel_dim"])
    if kind == "minimax":
        size = config.get("head_dim", hidden // config["num_attention_heads"])
        return 4 * recurrent * config["num_attention_heads"] * size * size
    return 4 * recurrent * hidden * config.get("conv_L_cache", 3) if kind in ("lfm2", "lfm2_moe") else 0


def test_there_are_sixty_configs_and_each_names_its_source():
    assert len(CONFIGS) == len(ENTRIES) >= 60
    assert all(entry["source"] for entry in ENTRIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_planned_bytes_of_a_config_are_those_of_its_entries(name):
    spec = spec_from_config(CONFIGS[name], name)
    text = text_of(CONFIGS[name])
    planned = spec.kv_spec(16, "bf16").bytes_per_token if spec.kv_layers else 0
    assert (planned, spec.state_bytes) == (bytes_per_token(text), state_bytes(text))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_with_other_towers_says_that_they_are_not_counted(name):
    towers = {"vision_config", "audio_config"} & set(CONFIGS[name])
    notes = spec_from_config(CONFIGS[name], name).notes
    assert any("towers are not counted" in note for note in notes) is bool(towers)
