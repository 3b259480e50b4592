"""Hypothetical models: one from a few numbers, and the attention variants of a given model."""

from dataclasses import dataclass, replace

from kvloom.errors import InvalidInputError
from kvloom.spec.layer import Attention, Experts, FeedForward, Latent, LayerSpec, Mlp, Recurrent
from kvloom.spec.model import DTYPE_BYTES, ModelSpec


@dataclass(frozen=True)
class Hypothesis:
    """The numbers of a hypothetical model; None is derived from the others or absent.

    `global_every` gives every Nth layer global attention and the others a `window`. `share_kv` layers in a row read
    one K/V (CLA); `yoco` lets the second half of the layers read one global K/V. `kv_rank` and `rope_dim` make the
    attention latent (MLA). `recurrent_every` leaves softmax attention to every Nth layer and gives the others
    a state of `state_elements` numbers.
    """

    layers: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    hidden: int | None = None
    intermediate: int | None = None
    vocab: int = 32000
    window: int | None = None
    global_every: int | None = None
    kv_rank: int | None = None
    rope_dim: int | None = None
    share_kv: int = 1
    yoco: bool = False
    experts: int | None = None
    experts_per_token: int = 2
    recurrent_every: int | None = None
    state_elements: int | None = None
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name, value in self.__dict__.items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise InvalidInputError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if self.dtype not in DTYPE_BYTES:
            raise InvalidInputError(f"dtype {self.dtype!r} is not known; known: {', '.join(DTYPE_BYTES)}")
        if self.yoco and self.layers < 2:
            raise InvalidInputError("--yoco needs at least 2 layers: half of them read the other half's K/V")
        if self.yoco and self.share_kv > 1:
            raise InvalidInputError("--yoco and --share-kv contradict each other; give one")
        if self.global_every is not None and self.window is None:
            raise InvalidInputError("--global-every says which layers have no window; give --window too")
        if (self.kv_rank is None) != (self.rope_dim is None):
            raise InvalidInputError("latent attention needs both --kv-rank and --rope-dim")
        if self.kv_rank is not None and self.kv_heads is not None:
            raise InvalidInputError("--kv-rank (latent attention) and --kv-heads contradict each other; give one")
        if (self.recurrent_every is None) != (self.state_elements is None):
            raise InvalidInputError("recurrent layers need both --recurrent-every and --state-elements")
        if self.experts is not None and self.experts_per_token > self.experts:
            raise InvalidInputError(f"--experts-per-token {self.experts_per_token} exceeds --experts {self.experts}")
        if self.head_dim is None and self.hidden is not None and self.hidden % self.heads:
            raise InvalidInputError(f"--hidden {self.hidden} is not divisible by --heads {self.heads}; give --head-dim")

    def build(self, name: str = "hypothetical") -> ModelSpec:
        """Return the model; its weights are an estimate with a gated MLP and two norms per layer."""
        if self.head_dim is not None:
            head_dim = self.head_dim
        else:
            head_dim = 128 if self.hidden is None else self.hidden // self.heads
        hidden = self.hidden or self.heads * head_dim
        inner = self.intermediate or -(-8 * hidden // 3 // 256) * 256
        notes = ["weights estimated from the numbers given"]
        if self.intermediate is None:
            notes.append(f"MLP width {inner} assumed (8/3 of the hidden size in steps of 256)")
        mlp: FeedForward = Mlp(inner)
        if self.experts is not None:
            mlp = Experts(self.experts, self.experts_per_token, inner)
        mixer: Attention | Latent = Attention(self.heads, self.kv_heads or self.heads, head_dim)
        if self.kv_rank is not None and self.rope_dim is not None:
            mixer = Latent(self.heads, None, self.kv_rank, head_dim, self.rope_dim, head_dim)
        layers = [self._layer(index, mixer, mlp, hidden) for index in range(self.layers)]
        return ModelSpec(name, "hypothetical", hidden, self.vocab, tuple(layers), tie_embeddings=False,
                         max_position=None, dtype=self.dtype, other_params=hidden, source="numbers as given",
                         exact=False, notes=tuple(notes))

    def _layer(self, index: int, mixer: Attention | Latent, mlp: FeedForward, hidden: int) -> LayerSpec:
        window = self.window
        if self.global_every is not None and (index + 1) % self.global_every == 0:
            window = None
        source: int | None = None
        half = self.layers // 2
        if self.recurrent_every is not None and (index + 1) % self.recurrent_every:
            assert self.state_elements is not None
            recurrent = Recurrent(self.state_elements, 4 * hidden * hidden, 0)
            return LayerSpec(recurrent, mlp, norm_params=2 * hidden)
        if self.yoco and index >= half:
            window, source = None, (half if index > half else None)
        elif index % self.share_kv and self.recurrent_every is None:
            source = index - index % self.share_kv
        if source is not None and isinstance(mixer, Attention):
            mixer = replace(mixer, owns_kv=False)
        return LayerSpec(mixer, mlp, window, source, norm_params=2 * hidden)


def attention_variants(spec: ModelSpec) -> list[tuple[str, ModelSpec]]:
    """Return the model as it is and with MHA, GQA-8, MQA and MLA (512+64) in place of its attention, named.

    Query heads and head size stay. The model's own variant is listed first and not twice. The others would have to be
    trained: their quality is not that of the model.
    """
    heads = {layer.mixer.num_heads for layer in spec.layers if isinstance(layer.mixer, (Attention, Latent))}
    if len(heads) != 1:
        raise InvalidInputError(f"{spec.name} has no attention to vary" if not heads else
                                f"{spec.name} has layers of {sorted(heads)} heads; variants need one number")
    num_heads = heads.pop()
    found: list[tuple[str, ModelSpec]] = [(f"{spec.attention_kind} (the model)", spec)]
    wanted: list[tuple[str, int | None]] = [("MHA", num_heads), ("GQA-8", 8), ("MQA", 1), ("MLA (512+64)", None)]
    for name, kv_heads in wanted:
        if name == spec.attention_kind or (kv_heads and (num_heads % kv_heads or (name == "GQA-8" and num_heads <= 8))):
            continue
        layers = tuple(replace(layer, mixer=_varied(layer.mixer, kv_heads)) for layer in spec.layers)
        found.append((name, replace(spec, layers=layers, weight_bytes=None, file_bytes=None, exact=False)))
    return found


def _varied(mixer: Attention | Latent | Recurrent, kv_heads: int | None) -> Attention | Latent | Recurrent:
    if isinstance(mixer, Recurrent):
        return mixer
    if isinstance(mixer, Latent):
        if kv_heads is None:
            return replace(mixer, kv_rank=512, rope_dim=64)
        return Attention(mixer.num_heads, kv_heads, mixer.v_dim)
    if kv_heads is not None:
        return replace(mixer, num_kv_heads=kv_heads)
    return Latent(mixer.num_heads, None, 512, mixer.head_dim, 64, mixer.v_width)
