"""Families of models that run, as readers of configs. Torch-free; their weights are in `kvloom.models.families`."""

from collections.abc import Mapping
from typing import Any

from kvloom.errors import CheckpointError, UnsupportedError
from kvloom.registry import Registry, near_copy
from kvloom.spec.families.alibi import BLOOM, MPT
from kvloom.spec.families.apertus import APERTUS
from kvloom.spec.families.cohere import COHERE, COHERE2
from kvloom.spec.families.ernie import ERNIE
from kvloom.spec.families.exaone4 import EXAONE4
from kvloom.spec.families.falcon import FALCON
from kvloom.spec.families.family import FamilyConfig
from kvloom.spec.families.gemma import GEMMA
from kvloom.spec.families.gemma2 import GEMMA2
from kvloom.spec.families.gemma3 import GEMMA3
from kvloom.spec.families.glm import GLM, GLM4
from kvloom.spec.families.gpt2 import GPT2, GPT_BIGCODE
from kvloom.spec.families.gpt_neox import GPT_NEOX
from kvloom.spec.families.gpt_oss import GPT_OSS
from kvloom.spec.families.granite import GRANITE, GRANITE_MOE
from kvloom.spec.families.hunyuan import HUNYUAN
from kvloom.spec.families.llama import LLAMA
from kvloom.spec.families.llama4 import LLAMA4
from kvloom.spec.families.mistral import MISTRAL
from kvloom.spec.families.nemotron import NEMOTRON
from kvloom.spec.families.olmo import OLMO2, OLMO3, OLMOE
from kvloom.spec.families.phi import PHI
from kvloom.spec.families.phi3 import PHI3
from kvloom.spec.families.phimoe import PHIMOE
from kvloom.spec.families.qwen import QWEN2, QWEN3
from kvloom.spec.families.routed import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from kvloom.spec.families.seed_oss import SEED_OSS
from kvloom.spec.families.smollm3 import SMOLLM3
from kvloom.spec.families.starcoder2 import STARCODER2

FAMILY_CONFIGS: Registry[FamilyConfig] = Registry("model family")
for _family in (
    LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, GEMMA2, GEMMA3, PHI3, GLM, GPT_NEOX, GPT2, GPT_BIGCODE, FALCON,
    BLOOM, MPT, MIXTRAL, QWEN3_MOE, GPT_OSS, GEMMA, GLM4, SEED_OSS, ERNIE, GRANITE, GRANITE_MOE, STARCODER2,
    COHERE, COHERE2, NEMOTRON, OLMO2, OLMO3, OLMOE, PHI, EXAONE4, HUNYUAN, QWEN2_MOE, PHIMOE, APERTUS, LLAMA4,
):  # fmt: skip
    FAMILY_CONFIGS.register(_family.name, _family)

__all__ = ["FAMILY_CONFIGS", "FamilyConfig", "family_of_config", "family_of_gguf", "family_of_type"]


def family_of_config(raw: Mapping[str, Any]) -> FamilyConfig:
    """Return the family of a config.json, by its `architectures`, else its `model_type`.

    Raises `UnsupportedError` naming the known architectures, or `CheckpointError` when the config names none.
    """
    names = raw.get("architectures") or []
    model_type = raw.get("model_type")
    if not isinstance(names, list) or not (names or model_type):
        raise CheckpointError("config.json names neither architectures nor a model_type; fetch the model again")
    families = [family for _, family in FAMILY_CONFIGS.items()]
    for family in families:
        if any(name in family.architectures for name in names) or (not names and model_type in family.model_types):
            return family
    wanted = str(names[0] if names else model_type)
    known = [name for family in families for name in (family.architectures if names else family.model_types)]
    reasons = [f"kvloom knows {', '.join(known)}{near_copy(wanted, known)}"]
    if raw.get("auto_map"):
        reasons.append("it needs code from the checkpoint (auto_map), which kvloom never runs")
    raise UnsupportedError(f"the architecture {wanted!r}", reasons)


def family_of_type(model_type: str) -> FamilyConfig | None:
    """Return the family whose configs have this `model_type`, or None."""
    return next((family for _, family in FAMILY_CONFIGS.items() if model_type in family.model_types), None)


def family_of_gguf(architecture: str, has_experts: bool = False) -> FamilyConfig:
    """Return the family of a GGUF file's `general.architecture`; raises `UnsupportedError` naming the known ones."""
    families = [family for _, family in FAMILY_CONFIGS.items() if family.gguf_architecture is not None]
    fitting = [family for family in families if family.gguf_architecture == architecture]
    if not fitting:
        known = list(dict.fromkeys(str(family.gguf_architecture) for family in families))
        hint = near_copy(architecture, known)
        raise UnsupportedError(f"the GGUF architecture {architecture!r}", [f"kvloom knows {', '.join(known)}{hint}"])
    return next((family for family in fitting if family.gguf_experts == has_experts), fitting[0])
