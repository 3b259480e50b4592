"""Tiny random models of every family and position variant, beside the same models in transformers."""

import json

import torch
import transformers

from kvloom.models.checkpoint import open_checkpoint
from kvloom.models.decoder import Decoder
from kvloom.spec.families import family_of_config

BASE = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT = {"vocab_size": 131, "n_embd": 48, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
BLOOM = {"vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2}
MPT = {"vocab_size": 131, "d_model": 48, "n_heads": 4, "n_layers": 3, "max_seq_len": 128}
ROUTED = {"num_experts_per_tok": 2, "num_local_experts": 5}


GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4, "logits_scaling": 0.7}


def rope(kind, **entries):
    """Return rope parameters of one kind."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **entries}}


def longrope(rotary=12, **entries):
    """Return LongRoPE parameters: an original length of 32, and divisors that differ for each pair."""
    half = rotary // 2
    return {
        "original_max_position_embeddings": 32,
        **rope(
            "longrope",
            short_factor=[1.0 + 0.1 * i for i in range(half)],
            long_factor=[1.5 + 0.7 * i for i in range(half)],
            **entries,
        ),
    }


LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}

VARIANTS = {
    "llama": ("Llama", {}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, linear": ("Llama", rope("linear", factor=3.0)),
    "llama, llama3": ("Llama", rope("llama3", **LLAMA3)),
    "llama, yarn": ("Llama", rope("yarn", **YARN)),
    "llama, yarn with mscales": ("Llama", rope("yarn", **YARN, mscale=0.7, mscale_all_dim=0.4, truncate=False)),
    "llama, yarn with its own amplitude": ("Llama", rope("yarn", **YARN, attention_factor=1.5, beta_fast=8.0)),
    "llama, dynamic": ("Llama", {**rope("dynamic", factor=2.0), "max_position_embeddings": 32}),
    "llama, longrope": ("Llama", longrope()),
    "mistral, window": ("Mistral", {"sliding_window": 11}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "mistral, wide heads": ("Mistral", {"sliding_window": None, "head_dim": 20}),
    "qwen2": ("Qwen2", {}),
    "qwen2, yarn": ("Qwen2", rope("yarn", **YARN)),
    "qwen2, windows from layer 1 on": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9,
                                                "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3, biases": ("Qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5}),
    "smollm3, windows": ("SmolLM3", {"num_hidden_layers": 5, "use_sliding_window": True, "sliding_window": 9}),
    "smollm3, listed layers": ("SmolLM3", {"no_rope_layers": [0, 1, 0], "tie_word_embeddings": False}),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 9,
                          "attn_logit_softcapping": 3.0, "final_logit_softcapping": 8.0}),
    "gemma2, no caps": ("Gemma2", {"head_dim": 16, "sliding_window": 9, "attn_logit_softcapping": None,
                                   "final_logit_softcapping": None}),
    "phi3": ("Phi3", {}),
    "phi3, window": ("Phi3", {"sliding_window": 9}),
    "phi3, longrope": ("Phi3", longrope()),
    "phi3, longrope on half of each head": ("Phi3", {**longrope(8, partial_rotary_factor=0.5), "hidden_size": 64}),
    "glm, neighbours on half of each head": ("Glm", {"head_dim": 16, "partial_rotary_factor": 0.5,
                                                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                                         "partial_rotary_factor": 0.5}}),
    "glm, neighbours on whole heads": ("Glm", {"head_dim": 16, "attention_bias": True,
                                               "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                                   "partial_rotary_factor": 1.0}}),
    "gpt-neox": ("GPTNeoX", {"hidden_size": 64}),
    "gpt-neox, one after the other": ("GPTNeoX", {"hidden_size": 64, "use_parallel_residual": False,
                                                  "attention_bias": False}),
    "gpt-neox, whole heads": ("GPTNeoX", rope("default", partial_rotary_factor=1.0)),
    "gpt2": ("GPT2", {}),
    "gpt2, untied": ("GPT2", {"tie_word_embeddings": False, "n_inner": 60, "activation_function": "gelu"}),
    "gpt-bigcode": ("GPTBigCode", {}),
    "gpt-bigcode, multi-head": ("GPTBigCode", {"multi_query": False}),
    "falcon 7b": ("Falcon", {}),
    "falcon 40b": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon 11b": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    "falcon, one after the other": ("Falcon", {"parallel_attn": False, "multi_query": False, "bias": True}),
    "bloom": ("Bloom", {"n_head": 4, "n_layer": 3, "hidden_size": 48}),
    "bloom, six heads": ("Bloom", {"n_head": 6, "n_layer": 3, "hidden_size": 48}),
    "mpt": ("Mpt", {"attn_config": {"clip_qkv": None}}),
    "mpt, six heads": ("Mpt", {"n_heads": 6, "attn_config": {"clip_qkv": 0.8, "softmax_scale": 0.4}}),
    "mixtral": ("Mixtral", ROUTED),
    "mixtral, window": ("Mixtral", {**ROUTED, "sliding_window": 9}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 16, "num_experts": 5, "num_experts_per_tok": 2,
                               "moe_intermediate_size": 40, "norm_topk_prob": True}),
    "qwen3-moe, every other layer": ("Qwen3Moe", {"head_dim": 16, "num_experts": 5, "num_experts_per_tok": 3,
                                                  "moe_intermediate_size": 40, "decoder_sparse_step": 2}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "glm4, neighbours on half of each head": ("Glm4", {"head_dim": 16, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "seed-oss": ("SeedOss", {"head_dim": 16, "attention_out_bias": True}),
    "seed-oss, biases of the MLP": ("SeedOss", {"head_dim": 16, "attention_bias": False, "mlp_bias": True}),
    "ernie": ("Ernie4_5", {"head_dim": 16}),
    "ernie, biases": ("Ernie4_5", {"head_dim": 16, "use_bias": True, "tie_word_embeddings": False}),
    "granite": ("Granite", GRANITE),
    "granite, biases": ("Granite", {**GRANITE, "attention_bias": True, "mlp_bias": True}),
    "granite-moe": ("GraniteMoe", {**GRANITE, **ROUTED}),
    "starcoder2": ("Starcoder2", {}),
    "starcoder2, window": ("Starcoder2", {"sliding_window": 9, "use_bias": False}),
    "cohere": ("Cohere", {"logit_scale": 1.5}),
    "cohere, biases": ("Cohere", {"logit_scale": 1.5, "attention_bias": True}),
    "cohere2": ("Cohere2", {"logit_scale": 1.5, "num_hidden_layers": 5, "sliding_window": 9}),
    "nemotron": ("Nemotron", {}),
    "nemotron, biases": ("Nemotron", {"attention_bias": True, "mlp_bias": True}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"num_hidden_layers": 4, "sliding_window": 9, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "yarn", "rope_theta": 5e5, **YARN}}}),
    "olmoe": ("Olmoe", {"num_experts": 5, "num_experts_per_tok": 2}),
    "phi": ("Phi", {"partial_rotary_factor": 0.5, "hidden_size": 64}),
    "phi, q and k normed": ("Phi", {"partial_rotary_factor": 0.5, "qk_layernorm": True, "hidden_size": 64}),
    "exaone4": ("Exaone4", {"num_hidden_layers": 4, "sliding_window": 9}),
    "exaone4, no windows": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "hunyuan": ("HunYuanDenseV1", {"head_dim": 12, "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}}),
    "qwen2-moe": ("Qwen2Moe", {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
                               "shared_expert_intermediate_size": 56, "mlp_only_layers": [1]}),
    "phimoe": ("Phimoe", {**ROUTED, "attention_bias": True, "lm_head_bias": True, **longrope(
        short_mscale=1.2, long_mscale=1.2)}),
    "apertus": ("Apertus", {}),
    "llama4": ("Llama4Text", {**ROUTED, "num_hidden_layers": 4, "head_dim": 12, "intermediate_size_mlp": 60,
                              "interleave_moe_layer_step": 2, "attention_chunk_size": 9, "floor_scale": 16,
                              "attn_scale": 0.4}),
    "llama4, whole context": ("Llama4Text", {**ROUTED, "head_dim": 12, "intermediate_size_mlp": 60,
                                             "use_qk_norm": False, "attention_chunk_size": None,
                                             "attn_temperature_tuning": False}),
    "gpt-oss": ("GptOss", {**ROUTED, "head_dim": 16, "sliding_window": 9,
                           **rope("yarn", **YARN, beta_fast=32.0, beta_slow=1.0, truncate=False)}),
}  # fmt: skip
"""Name of a variant -> (family as transformers spells it, what its config has beside `BASE`)."""


def _config_of(variant):
    """Return the config of transformers for a variant, and the class of its model."""
    kind, changes = VARIANTS[variant]
    base = {"GPT2": GPT, "GPTBigCode": GPT, "Bloom": BLOOM, "Mpt": MPT}.get(kind, BASE)
    config = getattr(transformers, f"{kind}Config")(**{**base, **changes})
    config._attn_implementation = "eager"
    names = {"GPT2": "GPT2LMHeadModel", "Llama4Text": "Llama4ForCausalLM"}
    return config, getattr(transformers, names.get(kind, f"{kind}ForCausalLM"))


def oracle_of(variant):
    """Return the random model of transformers for a variant, in float32."""
    config, model = _config_of(variant)
    return spread(model(config).eval())


def config_of(variant):
    """Return what we read in the config.json of a variant; no model is made."""
    config, model = _config_of(variant)
    raw = {**json.loads(config.to_json_string(use_diff=False)), "architectures": [model.__name__]}
    return family_of_config(raw).read(raw)


def spread(model):
    """Draw weights anew, large enough that attention is sharp and logits are of size ten."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.3)
            elif name.endswith("sinks"):
                weight.normal_(std=2.0)
            elif weight.dim() >= 2:
                turned = type(model).__name__.startswith("GPT2") and ".c_" in name
                fan = weight.shape[0] if turned else weight.shape[-1]
                weight.normal_(std=1.3 / fan**0.5)
            else:  # Gemma stores norms as their distance from one
                weight.normal_(mean=0.0 if type(model).__name__.startswith(("Gemma", "Nemotron")) else 1.0, std=0.2)
    return model


def decoder_of(oracle, folder):
    """Return the decoder of a model of transformers, through files in `folder`."""
    oracle.save_pretrained(folder)
    checkpoint = open_checkpoint(str(folder))
    return Decoder(checkpoint.config, dict(checkpoint.tensors(torch.float32)))


def expected_logits(oracle, tokens):
    """Return the logits [n, V] of transformers for tokens [n] in one piece."""
    with torch.no_grad():
        return oracle(torch.tensor([tokens])).logits[0].float()
