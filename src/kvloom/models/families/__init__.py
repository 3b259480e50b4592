"""Model families: names and storage of their weights, as data."""

from kvloom.models.families.alibi import BLOOM, MPT
from kvloom.models.families.apertus import APERTUS
from kvloom.models.families.cohere import COHERE, COHERE2
from kvloom.models.families.ernie import ERNIE
from kvloom.models.families.exaone4 import EXAONE4
from kvloom.models.families.falcon import FALCON
from kvloom.models.families.family import Family
from kvloom.models.families.gemma import GEMMA
from kvloom.models.families.gemma2 import GEMMA2
from kvloom.models.families.gemma3 import GEMMA3
from kvloom.models.families.glm import GLM, GLM4
from kvloom.models.families.gpt2 import GPT2, GPT_BIGCODE
from kvloom.models.families.gpt_neox import GPT_NEOX
from kvloom.models.families.gpt_oss import GPT_OSS
from kvloom.models.families.granite import GRANITE, GRANITE_MOE
from kvloom.models.families.hunyuan import HUNYUAN
from kvloom.models.families.llama import LLAMA
from kvloom.models.families.llama4 import LLAMA4
from kvloom.models.families.mistral import MISTRAL
from kvloom.models.families.nemotron import NEMOTRON
from kvloom.models.families.olmo import OLMO2, OLMO3, OLMOE
from kvloom.models.families.phi import PHI
from kvloom.models.families.phi3 import PHI3
from kvloom.models.families.phimoe import PHIMOE
from kvloom.models.families.qwen import QWEN2, QWEN3
from kvloom.models.families.routed import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from kvloom.models.families.seed_oss import SEED_OSS
from kvloom.models.families.smollm3 import SMOLLM3
from kvloom.models.families.starcoder2 import STARCODER2
from kvloom.registry import Registry

FAMILIES: Registry[Family] = Registry("model family")
for _family in (
    LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, GEMMA2, GEMMA3, PHI3, GLM, GPT_NEOX, GPT2, GPT_BIGCODE, FALCON,
    BLOOM, MPT, MIXTRAL, QWEN3_MOE, GPT_OSS, GEMMA, GLM4, SEED_OSS, ERNIE, GRANITE, GRANITE_MOE, STARCODER2,
    COHERE, COHERE2, NEMOTRON, OLMO2, OLMO3, OLMOE, PHI, EXAONE4, HUNYUAN, QWEN2_MOE, PHIMOE, APERTUS, LLAMA4,
):  # fmt: skip
    FAMILIES.register(_family.name, _family)

__all__ = ["FAMILIES", "Family"]
