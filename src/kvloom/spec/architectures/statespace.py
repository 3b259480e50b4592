"""State-space models (Mamba)."""

from kvloom.spec.architectures.entries import Config, Reader, build
from kvloom.spec.layer import LayerSpec, Recurrent
from kvloom.spec.model import ModelSpec


def _mamba(config: Config) -> ModelSpec:
    hidden, count = config.number("hidden_size"), config.number("num_hidden_layers")
    inner = config.number("intermediate_size", default=config.number("expand", default=2) * hidden)
    state, kernel = config.number("state_size", default=16), config.number("conv_kernel", default=4)
    rank = config.fields.get("time_step_rank")
    rank = -(-hidden // 16) if rank in (None, "auto") else config.number("time_step_rank")
    bias = config.flag("use_bias", False)
    mixer = Recurrent(
        state_elements=inner * (state + kernel),
        matrix_params=3 * hidden * inner + inner * (rank + 2 * state) + rank * inner,
        other_params=inner * (kernel + 1 + 1 + state + 1) + (2 * inner + hidden if bias else 0),
    )
    layers = [LayerSpec(mixer, None, norm_params=hidden) for _ in range(count)]
    return build(config, layers, hidden, tie_embeddings=config.flag("tie_word_embeddings", True))


STATE_READERS: dict[str, Reader] = {"mamba": _mamba, "falcon_mamba": _mamba}
