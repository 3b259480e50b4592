"""Gemma 3n and Gemma 4: an embedding per layer, K/V that later layers share, and wider heads in global layers."""

from kvloom.errors import InvalidInputError
from kvloom.spec.architectures.entries import Config, Reader, attention, build, windows
from kvloom.spec.layer import LayerSpec, Mlp
from kvloom.spec.model import ModelSpec


def _gemma3n(config: Config) -> ModelSpec:
    hidden, count = config.number("hidden_size"), config.number("num_hidden_layers")
    head_dim = config.number("head_dim", default=256)
    found = windows(config, count, lambda i: bool((i + 1) % 5))
    shared = config.fields.get("num_kv_shared_layers") or 0
    first = count - shared
    streams, rank = config.number("altup_num_inputs", default=4), config.number("laurel_rank", default=64)
    per_layer = config.number("hidden_size_per_layer_input", default=256)
    width = config.fields.get("intermediate_size")
    layers: list[LayerSpec] = []
    for i, window in enumerate(found):
        source = None
        if i >= first:
            alike = [j for j in range(first) if (found[j] is None) == (window is None)]
            if not alike:
                raise InvalidInputError(f"layer {i} of {config.name} shares K/V, but no earlier layer is of its kind")
            source = alike[-1]
        mlp = Mlp(width[i] if isinstance(width, list) else config.number("intermediate_size"))
        mixer = attention(config, head_dim=head_dim, extra_params=(2 if source is None else 1) * head_dim,
                          owns_kv=source is None)
        extra = streams * streams + streams**3 + hidden * streams + 2 * hidden * rank + 2 * hidden * per_layer
        layers.append(LayerSpec(mixer, mlp, window, source, norm_params=8 * hidden, extra_params=extra))
    table = config.number("vocab_size_per_layer_input", default=262144) * count * per_layer
    mixing = hidden * count * per_layer + per_layer + 2 * (streams - 1) * hidden * hidden
    return build(config, layers, hidden, tie_embeddings=config.flag("tie_word_embeddings", True),
                 other_params=hidden + table + mixing, table_params=table)


GEMMA_READERS: dict[str, Reader] = {"gemma3n_text": _gemma3n, "gemma3n": _gemma3n}
