"""StarCoder 2: LayerNorms, a plain MLP and biases around grouped rotary attention, with a window on all layers."""

from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families.config_reader import ConfigReader
from kvloom.spec.families.family import FamilyConfig
from kvloom.spec.families.skeleton import all_windowed, nothing_implied, skeleton


def _configure(reader: ConfigReader) -> DecoderConfig:
    biased = reader.flag("use_bias")
    return skeleton(
        reader,
        "starcoder2",
        all_windowed(reader),
        norm="layer",
        norm_bias=True,
        norm_eps=reader.number("norm_epsilon"),
        gated=False,
        attention_bias=biased,
        output_bias=biased,
        mlp_bias=biased,
    )


STARCODER2 = FamilyConfig(
    name="starcoder2",
    architectures=("Starcoder2ForCausalLM",),
    model_types=("starcoder2",),
    gguf_architecture=None,
    defaults={
        "vocab_size": 49152,
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "norm_epsilon": 1e-5,
        "rope_theta": 10000.0,
        "use_bias": True,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    configure=_configure,
    from_gguf=nothing_implied,
)
