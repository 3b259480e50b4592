"""Numbers of weights: the catalogue against what publishers say, and every reader against transformers."""

import pytest

from kvloom.spec.catalogue import catalogue_entry, catalogue_names, catalogue_spec
from kvloom.spec.config_json import spec_from_config

PUBLISHED = [name for name in catalogue_names() if "published_params" in catalogue_entry(name)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_catalogue_has_exactly_the_published_number_of_weights(name):
    assert catalogue_spec(name).num_params == catalogue_entry(name)["published_params"]


@pytest.mark.parametrize("name", catalogue_names())
def test_every_catalogue_entry_names_its_source(name):
    assert len(catalogue_spec(name).source) > 20


DECODER = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
LATENT = {
    **DECODER, "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 8,
    "n_shared_experts": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA2 = {"mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_d_state": 8}
LINEAR = {
    "head_dim": 16, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
TINY = {
    "llama": {**DECODER, "head_dim": 16, "attention_bias": True, "mlp_bias": True},
    "mistral": {**DECODER, "sliding_window": 8},
    "mixtral": {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": DECODER,
    "qwen3": {**DECODER, "head_dim": 16},
    "qwen3_moe": {**DECODER, **MOE, "head_dim": 16, "decoder_sparse_step": 2},
    "qwen3_next": {
        **DECODER, **MOE, "head_dim": 16, "shared_expert_intermediate_size": 24, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "num_hidden_layers": 4,
    },
    "gemma": {**DECODER, "head_dim": 16},
    "gemma2": {**DECODER, "head_dim": 16, "sliding_window": 8},
    "gemma3_text": {**DECODER, "head_dim": 16, "sliding_window": 8},
    "gemma3n_text": {
        **DECODER, "head_dim": 16, "sliding_window": 8, "num_hidden_layers": 10, "num_kv_shared_layers": 5,
        "vocab_size_per_layer_input": 80, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
    },
    "glm4": {**DECODER, "head_dim": 16, "pad_token_id": 0},
    "seed_oss": {**DECODER, "head_dim": 16, "attention_out_bias": True, "mlp_bias": True},
    "ernie4_5": {**DECODER, "head_dim": 16, "use_bias": True},
    "granite": {**DECODER, "attention_bias": True, "mlp_bias": True},
    "granitemoe": {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
    "starcoder2": DECODER,
    "cohere": DECODER,
    "cohere2": {**DECODER, "attention_bias": True},
    "nemotron": {**DECODER, "attention_bias": True, "mlp_bias": True},
    "phi": {**DECODER, "num_key_value_heads": 4},
    "phi3": {**DECODER, "pad_token_id": 0},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "gpt_oss": {**DECODER, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 96},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 96},
    "gpt_neox": {k: v for k, v in DECODER.items() if k != "num_key_value_heads"},
    "falcon": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
    "bloom": {"vocab_size": 96, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "mpt": {"vocab_size": 96, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
    "mamba": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8},
    "smollm3": {**DECODER, "pad_token_id": 0},
    "olmo2": DECODER,
    "olmo3": DECODER,
    "olmoe": {**DECODER, "num_experts": 8, "num_experts_per_tok": 2},
    "exaone4": DECODER,
    "hunyuan_v1_dense": {**DECODER, "head_dim": 16},
    "qwen2_moe": {**DECODER, **MOE, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1]},
    "phimoe": {**DECODER, "num_local_experts": 4, "attention_bias": True, "lm_head_bias": True},
    "apertus": {**DECODER, "pad_token_id": 0},
    "llama4_text": {**DECODER, "head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 60,
                    "interleave_moe_layer_step": 2},
    "deepseek_v32": {**LATENT, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 16},
    "glm4_moe_lite": LATENT,
    "glm4_moe": {**DECODER, "head_dim": 16, "moe_intermediate_size": 16, "n_routed_experts": 8,
                 "num_experts_per_tok": 2, "use_qk_norm": True, "attention_bias": True},
    "exaone_moe": {**DECODER, **MOE, "num_shared_experts": 2, "sliding_window": 8},
    "ernie4_5_moe": {**DECODER, "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 16,
                     "moe_layer_interval": 2},
    "hunyuan_v1_moe": {**DECODER, "head_dim": 16, "num_experts": 4, "moe_topk": [2] * 6},
    "minimax_m2": {**DECODER, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
    "arcee": {**DECODER, "attention_bias": True, "mlp_bias": True},
    "ministral3": DECODER,
    "olmo": DECODER,
    "opt": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48,
            "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "gptj": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 96, "rotary_dim": 4},
    "mamba2": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "num_heads": 8,
               "head_dim": 8, "n_groups": 2},
    "falcon_h1": {**DECODER, **MAMBA2, "mamba_d_ssm": 32, "mamba_d_head": 8},
    "granitemoehybrid": {**DECODER, **MAMBA2, "mamba_n_heads": 8, "num_local_experts": 4,
                         "shared_intermediate_size": 24, "layer_types": ["mamba", "mamba", "attention"] * 2},
    "bamba": {**DECODER, **MAMBA2, "mamba_n_heads": 8, "attn_layer_indices": [2, 5]},
    "jamba": {**DECODER, "num_experts": 4, "mamba_d_state": 8},
    "nemotron_h": {**{k: v for k, v in DECODER.items() if k != "num_hidden_layers"}, "mamba_num_heads": 8,
                   "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "moe_intermediate_size": 16,
                   "moe_shared_expert_intermediate_size": 24, "n_routed_experts": 4,
                   "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba"]},
    "qwen3_5_text": {**DECODER, **LINEAR, "num_hidden_layers": 4},
    "qwen3_5_moe_text": {**DECODER, **MOE, **LINEAR, "shared_expert_intermediate_size": 24, "num_hidden_layers": 4},
    "lfm2": {**DECODER, "full_attn_idxs": [2, 5], "block_multiple_of": 8},
    "lfm2_moe": {**DECODER, **MOE, "num_dense_layers": 2, "layer_types": ["conv", "conv", "full_attention"] * 2},
    "gemma4_text": {**DECODER, "head_dim": 16, "global_head_dim": 24, "num_global_key_value_heads": 1,
                    "attention_k_eq_v": True, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
                    "moe_intermediate_size": 16, "vocab_size_per_layer_input": 80, "hidden_size_per_layer_input": 8,
                    "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
                    "layer_types": ["sliding_attention", "full_attention"] * 3},
    "stablelm": {**DECODER, "use_qkv_bias": True},
}  # fmt: skip


@pytest.mark.parametrize("family", TINY)
def test_a_reader_counts_the_weights_that_transformers_builds(family):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    config = transformers.AutoConfig.for_model(family, **TINY[family])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    stored = [b for name, b in model.named_buffers() if name in model.state_dict()]
    built = sum(p.numel() for p in [*model.parameters(), *stored])
    assert spec_from_config(config.to_dict(), family).num_params == built
