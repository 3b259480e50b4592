"""One decoder layer: its mixer of tokens and its MLP, with the parameters of each.

Counts are in weights (numbers), not bytes. `hidden` is the width of the residual stream.
"""

from dataclasses import dataclass
from typing import TypeAlias

from kvloom.errors import InvalidInputError


@dataclass(frozen=True)
class Attention:
    """Softmax attention with `num_kv_heads` K/V heads: MHA, GQA or MQA.

    `gated` doubles the query projection (the second half gates the output, Qwen3-Next). `extra_params` counts the
    small vectors: norms of q and k, learned sinks. A layer that reads another layer's K/V keeps `owns_kv=False`;
    with `v_of_k` one projection makes K and V, which are cached apart (Gemma 4).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    gated: bool = False
    extra_params: int = 0
    owns_kv: bool = True
    v_of_k: bool = False

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise InvalidInputError(
                f"{self.num_heads} query heads are not divisible by {self.num_kv_heads} KV heads; "
                "choose a number of KV heads that divides the query heads"
            )

    @property
    def v_width(self) -> int:
        """Elements of V per head and token."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    def projections(self, hidden: int) -> dict[str, int]:
        """Return the weights of each projection matrix, without biases."""
        heads = self.num_heads * (2 if self.gated else 1)
        found = {"q": hidden * heads * self.head_dim}
        if self.owns_kv:
            found["k"] = hidden * self.num_kv_heads * self.head_dim
            if not self.v_of_k:
                found["v"] = hidden * self.num_kv_heads * self.v_width
        found["o"] = self.num_heads * self.v_width * hidden
        return found

    def small_params(self, hidden: int) -> int:
        """Return the weights outside the matrices: biases and norms."""
        total = self.extra_params
        if self.qkv_bias:
            total += self.num_heads * self.head_dim * (2 if self.gated else 1)
            if self.owns_kv:
                total += self.num_kv_heads * (self.head_dim + self.v_width)
        return total + (hidden if self.out_bias else 0)

    def attention_flops(self, num_keys: float) -> float:
        """Return the floating-point operations of one query token over `num_keys` keys (q.k and p.v)."""
        return 2.0 * self.num_heads * num_keys * (self.head_dim + self.v_width)


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (MLA): one latent and one rotary key per token, shared by all heads.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1. Cached per token and layer: `kv_rank + rope_dim` numbers, and
    `index_dim` where an indexer of `index_heads` heads chooses the tokens to attend to (DeepSeek-V3.2).
    """

    num_heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    bias: bool = False
    index_heads: int = 0
    index_dim: int = 0

    @property
    def width(self) -> int:
        """Cached numbers per token: the latent and the shared rotary key."""
        return self.kv_rank + self.rope_dim

    def projections(self, hidden: int) -> dict[str, int]:
        """Return the weights of each projection matrix, without norms."""
        query = self.num_heads * (self.nope_dim + self.rope_dim)
        found: dict[str, int] = {}
        if self.q_rank is None:
            found["q"] = hidden * query
        else:
            found["q_down"] = hidden * self.q_rank
            found["q_up"] = self.q_rank * query
        found["kv_down"] = hidden * self.width
        found["kv_up"] = self.kv_rank * self.num_heads * (self.nope_dim + self.v_dim)
        found["o"] = self.num_heads * self.v_dim * hidden
        if self.index_dim:
            found["index_q"] = (self.q_rank or hidden) * self.index_heads * self.index_dim
            found["index_k_down"] = hidden * (self.index_dim + self.index_heads)
        return found

    def small_params(self, hidden: int) -> int:
        """Return the weights outside the matrices: the norms of the latents, and biases if there are any."""
        norms = self.kv_rank + (self.q_rank or 0) + 2 * self.index_dim
        return norms + (((self.q_rank or 0) + self.width + hidden) if self.bias else 0)

    def attention_flops(self, num_keys: float) -> float:
        """Return the operations of one query over `num_keys` keys in the absorbed form (scores on the latent)."""
        return 2.0 * self.num_heads * num_keys * (self.width + self.kv_rank)

    def expanded_flops(self, num_keys: float) -> float:
        """Return the operations of one query over `num_keys` keys that were expanded per head (prefill)."""
        return 2.0 * self.num_heads * num_keys * (self.nope_dim + self.rope_dim + self.v_dim)


@dataclass(frozen=True)
class Recurrent:
    """A layer with a state of fixed size instead of keys and values (linear attention, state-space models).

    `state_elements` are kept per request in `state_bytes` bytes each, however long the context is. A block that is an
    MLP alone (Nemotron-H) has a mixer of no elements.
    """

    state_elements: int
    matrix_params: int
    other_params: int
    state_bytes: int = 4

    def projections(self, hidden: int) -> dict[str, int]:
        """Return the weights of the layer's matrices; `hidden` is part of them already."""
        return {"mixer": self.matrix_params}

    def small_params(self, hidden: int) -> int:
        """Return the weights outside the matrices."""
        return self.other_params

    def attention_flops(self, num_keys: float) -> float:
        """Return the operations of one token: the state is decayed, written and read once, at any length."""
        return 6.0 * self.state_elements


@dataclass(frozen=True)
class Mlp:
    """A dense MLP: up and down matrices, and a gate when `matrices` is 3."""

    intermediate: int
    matrices: int = 3
    up_bias: bool = False
    down_bias: bool = False

    def matrix_params(self, hidden: int) -> int:
        """Return the weights of the matrices that every token is multiplied with."""
        return self.matrices * hidden * self.intermediate

    active_matrix_params = matrix_params

    def small_params(self, hidden: int) -> int:
        """Return the weights of the biases."""
        up = (self.matrices - 1) * self.intermediate if self.up_bias else 0
        return up + (hidden if self.down_bias else 0)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: `per_token` of `num_experts` MLPs run for a token, and the shared MLP always."""

    num_experts: int
    per_token: int
    intermediate: int
    shared_intermediate: int = 0
    matrices: int = 3
    bias: bool = False
    router_params: int = 0
    shared_gate: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.num_experts:
            raise InvalidInputError(
                f"{self.per_token} of {self.num_experts} experts per token; it must be from 1 to {self.num_experts}"
            )

    def expert_params(self, hidden: int) -> int:
        """Return the matrix weights of one routed expert."""
        return self.matrices * hidden * self.intermediate

    def common_params(self, hidden: int) -> int:
        """Return the matrix weights that every token uses: the shared expert and the router."""
        gate = hidden if self.shared_gate else 0
        return self.matrices * hidden * self.shared_intermediate + hidden * self.num_experts + gate

    def matrix_params(self, hidden: int) -> int:
        """Return the weights of all matrices, whether a token uses them or not."""
        return self.num_experts * self.expert_params(hidden) + self.common_params(hidden)

    def active_matrix_params(self, hidden: int) -> int:
        """Return the weights that one token is multiplied with."""
        return self.per_token * self.expert_params(hidden) + self.common_params(hidden)

    def small_params(self, hidden: int) -> int:
        """Return the weights of biases and of the router's correction terms."""
        per_expert = (self.matrices - 1) * self.intermediate + hidden
        return self.router_params + (self.num_experts * per_expert if self.bias else 0)


Mixer: TypeAlias = Attention | Latent | Recurrent
FeedForward: TypeAlias = Mlp | Experts


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: a mixer and an MLP (None where the mixer is the whole layer), and its norms.

    `window` counts the query itself: query i reads keys j with 0 <= i - j < window; None reads all.
    `source` names the earlier layer whose K/V this one reads. `extra_params` holds matrices of neither part
    that every token is multiplied with; `norm_params` holds vectors. `beside` is a recurrence that reads the same
    input as attention (Falcon-H1).
    """

    mixer: Mixer
    mlp: FeedForward | None
    window: int | None = None
    source: int | None = None
    norm_params: int = 0
    extra_params: int = 0
    beside: Recurrent | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise InvalidInputError(f"a window of {self.window} tokens; it must be at least 1")

    def num_params(self, hidden: int) -> int:
        """Return all weights of the layer."""
        mlp = 0 if self.mlp is None else self.mlp.matrix_params(hidden) + self.mlp.small_params(hidden)
        mixer = sum(self.mixer.projections(hidden).values()) + self.mixer.small_params(hidden)
        beside = 0 if self.beside is None else self.beside.matrix_params + self.beside.other_params
        return mixer + beside + mlp + self.norm_params + self.extra_params

    def active_matrix_params(self, hidden: int) -> int:
        """Return the weights that one token is multiplied with."""
        mlp = 0 if self.mlp is None else self.mlp.active_matrix_params(hidden)
        beside = 0 if self.beside is None else self.beside.matrix_params
        return sum(self.mixer.projections(hidden).values()) + beside + mlp + self.extra_params

    @property
    def recurrences(self) -> tuple[Recurrent, ...]:
        """The recurrent parts of the layer."""
        return tuple(part for part in (self.mixer, self.beside) if isinstance(part, Recurrent))
