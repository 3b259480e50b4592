"""Mixtures of experts of transformers with random weights, and the same weights under our names: the outside oracle."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.phimoe.modeling_phimoe import PhimoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from kvloom.spec.decoder import DecoderConfig, ExpertsConfig, LayerConfig

HIDDEN, WIDE = 64, 48
_SIZES = {"hidden_size": HIDDEN, "moe_intermediate_size": WIDE, "num_experts_per_tok": 4}


@dataclass(frozen=True)
class Mixture:
    """A block of transformers, what our definition calls its shape, and its weights under our names."""

    block: torch.nn.Module
    config: DecoderConfig
    weights: dict[str, torch.Tensor]

    @property
    def experts(self) -> ExpertsConfig:
        """The shape of the mixture."""
        assert self.config.experts is not None
        return self.config.experts

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        """Return what transformers makes of x [T, hidden]."""
        with torch.no_grad():
            out = self.block(x[None])
        return (out[0] if isinstance(out, tuple) else out).view_as(x)


def _mixtral() -> tuple[torch.nn.Module, ExpertsConfig]:
    config = transformers.MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=WIDE, num_local_experts=8, num_experts_per_tok=2
    )
    return MixtralSparseMoeBlock(config), ExpertsConfig(8, 2, WIDE)


def _qwen3() -> tuple[torch.nn.Module, ExpertsConfig]:
    config = transformers.Qwen3MoeConfig(**_SIZES, num_experts=16, norm_topk_prob=True)
    return Qwen3MoeSparseMoeBlock(config), ExpertsConfig(16, 4, WIDE)


def _qwen2() -> tuple[torch.nn.Module, ExpertsConfig]:
    config = transformers.Qwen2MoeConfig(
        **_SIZES, num_experts=16, shared_expert_intermediate_size=80, norm_topk_prob=False
    )
    experts = ExpertsConfig(16, 4, WIDE, normalise=False, shared_size=80, shared_gate=True)
    return Qwen2MoeSparseMoeBlock(config), experts


def _deepseek() -> tuple[torch.nn.Module, ExpertsConfig]:
    config = transformers.DeepseekV3Config(
        **_SIZES, n_routed_experts=16, n_group=4, topk_group=2, n_shared_experts=2, routed_scaling_factor=2.5
    )
    experts = ExpertsConfig(
        16, 4, WIDE, sigmoid=True, selection_bias=True, scale=2.5, groups=4, kept_groups=2, group_best=2,
        shared_size=2 * WIDE,
    )  # fmt: skip
    return DeepseekV3MoE(config), experts


def _gpt_oss() -> tuple[torch.nn.Module, ExpertsConfig]:
    config = transformers.GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=WIDE, num_local_experts=8, num_experts_per_tok=4
    )
    return GptOssMLP(config), ExpertsConfig(8, 4, WIDE, bias=True, clamp=(1.702, 7.0))


def _phimoe() -> tuple[torch.nn.Module, ExpertsConfig]:
    config = transformers.PhimoeConfig(
        hidden_size=HIDDEN, intermediate_size=WIDE, num_local_experts=8, num_experts_per_tok=2, router_jitter_noise=0.1
    )
    return PhimoeSparseMoeBlock(config), ExpertsConfig(8, 2, WIDE, jitter=0.1)


def _llama4() -> tuple[torch.nn.Module, ExpertsConfig]:
    config = transformers.Llama4TextConfig(
        hidden_size=HIDDEN, intermediate_size=WIDE, num_local_experts=8, num_experts_per_tok=2
    )
    experts = ExpertsConfig(8, 2, WIDE, normalise=False, sigmoid=True, shared_size=WIDE, scale_input=True)
    return Llama4TextMoe(config), experts


MIXTURES: dict[str, Callable[[], tuple[torch.nn.Module, ExpertsConfig]]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2,
    "qwen3_moe": _qwen3,
    "deepseek_v3": _deepseek,
    "gpt_oss": _gpt_oss,
    "phimoe": _phimoe,
    "llama4": _llama4,
}


def mixture_of(name: str) -> Mixture:
    """Return a mixture whose weights, biases of the selection included, are all random."""
    block, experts = MIXTURES[name]()
    generator = torch.Generator().manual_seed(5)
    state = {}
    for key, value in block.eval().state_dict().items():
        spread = 0.5 if "gate.weight" in key or "router" in key or "correction" in key else 2 / HIDDEN**0.5
        state[key] = torch.randn(value.shape, generator=generator) * spread
    block.load_state_dict(state)
    config = DecoderConfig(
        family=name, vocab_size=8, hidden_size=HIDDEN, intermediate_size=WIDE, num_heads=4, num_kv_heads=4, head_dim=16,
        layers=(LayerConfig(None, None, routed=True),), max_position=64, norm_eps=1e-5, activation="silu",
        query_scale=1.0, tie_embeddings=True, experts=experts,
    )  # fmt: skip
    return Mixture(block, config, _ours(state))


def _ours(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    gate_up, down = state["experts.gate_up_proj"], state["experts.down_proj"]
    ours = {"router": state["router.weight" if "router.weight" in state else "gate.weight"]}
    if "experts.gate_up_proj_bias" in state:  # gpt-oss: [E, in, out], gate and up in turn
        biases = state["experts.gate_up_proj_bias"]
        ours |= {"router_bias": state["router.bias"], "experts_down_bias": state["experts.down_proj_bias"]}
        ours |= {"experts_gate_bias": biases[:, ::2], "experts_up_bias": biases[:, 1::2]}
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        gate, up = gate_up[:, ::2], gate_up[:, 1::2]
    else:
        if gate_up.shape[1] == HIDDEN:  # Llama 4: [E, in, out]
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        gate, up = gate_up.chunk(2, dim=1)
    ours |= {"experts_gate": gate, "experts_up": up, "experts_down": down}
    names = {
        "gate.e_score_correction_bias": "router_selection_bias",
        "shared_expert_gate.weight": "shared_router",
    }
    for key, value in state.items():
        if key.startswith(("shared_expert.", "shared_experts.")):
            ours["shared_" + key.split(".")[1].removesuffix("_proj")] = value
        elif key in names:
            ours[names[key]] = value
    return {name: value.contiguous() for name, value in ours.items()}
