"""Gemma 3n and Gemma 4: an embedding per layer, K/V that later layers share, and wider heads in global layers."""

from collections.abc import Sequence

from kvloom.errors import InvalidInputError
from kvloom.spec.architectures.entries import Config, Reader, attention, build, windows
from kvloom.spec.layer import Experts, FeedForward, LayerSpec, Mlp
from kvloom.spec.model import ModelSpec


def _source(config: Config, found: Sequence[int | None], first: int, layer: int) -> int | None:
    """Return the last layer before `first` whose window is of the kind of `layer`, None for layers with own K/V."""
    if layer < first:
        return None
    alike = [j for j in range(first) if (found[j] is None) == (found[layer] is None)]
    if not alike:
        raise InvalidInputError(f"layer {layer} of {config.name} shares K/V, but no earlier layer is of its kind")
    return alike[-1]


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
        source = _source(config, found, first, i)
        mlp = Mlp(width[i] if isinstance(width, list) else config.number("intermediate_size"))
        mixer = attention(config, head_dim=head_dim, extra_params=(2 if source is None else 1) * head_dim,
                          owns_kv=source is None)
        extra = streams * streams + streams**3 + hidden * streams + 2 * hidden * rank + 2 * hidden * per_layer
        layers.append(LayerSpec(mixer, mlp, window, source, norm_params=8 * hidden, extra_params=extra))
    table = config.number("vocab_size_per_layer_input", default=262144) * count * per_layer
    mixing = hidden * count * per_layer + per_layer + 2 * (streams - 1) * hidden * hidden
    return build(config, layers, hidden, tie_embeddings=config.flag("tie_word_embeddings", True),
                 other_params=hidden + table + mixing, table_params=table)


def _heads_of(config: Config, layer: int, k_is_v: bool, is_global: bool) -> dict[str, int]:
    """Return head size and KV heads of a layer: by `per_layer_config`, else by the entries of global layers."""
    given = config.fields.get("per_layer_config")
    if isinstance(given, dict):
        own = {int(key): entries for key, entries in given.items() if str(key).isdecimal()}.get(layer, {})
        named = Config({**config.fields, **own}, config.name)
        return {"head_dim": named.number("head_dim", default=256), "num_kv_heads": named.number("num_key_value_heads")}
    heads = config.number("num_key_value_heads")
    if not is_global:
        return {"head_dim": config.number("head_dim", default=256), "num_kv_heads": heads}
    if k_is_v:
        heads = config.number("num_global_key_value_heads", default=heads)
    return {"head_dim": config.number("global_head_dim", default=512), "num_kv_heads": heads}


def _gemma4(config: Config) -> ModelSpec:
    """Gemma 4: global layers have heads and numbers of KV heads of their own, and may make V of K's projection."""
    hidden, count = config.number("hidden_size"), config.number("num_hidden_layers")
    found = windows(config, count, lambda i: bool((i + 1) % 6))
    first = count - config.count("num_kv_shared_layers")
    per_layer, k_is_v = config.count("hidden_size_per_layer_input"), config.flag("attention_k_eq_v", False)
    layers: list[LayerSpec] = []
    for i, window in enumerate(found):
        source = _source(config, found, first, i)
        facts = _heads_of(config, i, window is None and k_is_v, window is None)
        norms = (1 if source is not None else 2) * facts["head_dim"]
        mixer = attention(config, extra_params=norms, owns_kv=source is None, v_of_k=k_is_v and window is None, **facts)
        wide = config.flag("use_double_wide_mlp", False) and source is not None
        width = config.number("intermediate_size") * (2 if wide else 1)
        mlp: FeedForward = Mlp(width)
        vectors = 4 * hidden + 1 + (hidden if per_layer else 0)
        if config.flag("enable_moe_block", False):  # the dense MLP runs beside the experts, as a shared one
            experts = config.number("num_experts")
            mlp = Experts(experts, config.number("top_k_experts"), config.number("moe_intermediate_size"), width,
                          router_params=experts + hidden)  # fmt: skip
            vectors += 3 * hidden
        extra = 2 * hidden * per_layer
        layers.append(LayerSpec(mixer, mlp, window, source, norm_params=vectors, extra_params=extra))
    table = config.number("vocab_size_per_layer_input", default=262144) * count * per_layer
    mixing = hidden * count * per_layer + per_layer
    return build(config, layers, hidden, tie_embeddings=config.flag("tie_word_embeddings", True),
                 other_params=hidden + table + mixing, table_params=table)  # fmt: skip


GEMMA_READERS: dict[str, Reader] = {"gemma3n_text": _gemma3n, "gemma3n": _gemma3n, "gemma4_text": _gemma4}
