"""The fused parts of every decoder; `lowering` makes a short flat list of them for each layer. Torch-free.

The parts change the residual stream x [T, hidden]. A `Norm` computes the input of the next product, `Heads` computes q,
k and v from that input, `Append` writes k and v to the lanes, `Attend` and `Up` compute the input of a later `Add`,
which multiplies it and adds to x. Attention and MLP one after the other, or in parallel, are two orders of the parts::

    Norm Heads Append Attend Add   Norm Up Add
    Norm Heads Append Attend       Norm Up     Add Add

An executor iterates over the list; the parts that it cannot execute are its only limits. Weights have the names of the
family; the bias of a weight is `NAME_bias`.
"""

from dataclasses import dataclass

from kvloom.spec.decoder import RopeConfig


@dataclass(frozen=True)
class NormSpec:
    """A norm with the weight of that name, or none: RMSNorm, or LayerNorm if `centred`, which may be `biased`."""

    weight: str | None
    eps: float
    centred: bool = False
    biased: bool = False


@dataclass(frozen=True)
class ProductSpec:
    """A product with the matrices of these names, their rows one below the other; `biased` if they all have biases."""

    weights: tuple[str, ...]
    biased: bool = False


@dataclass(frozen=True)
class Embed:
    """x = rows of the embedding times `scale`, plus rows of the table of positions if `learned`, through `norm`."""

    scale: float
    learned: bool
    norm: NormSpec | None


@dataclass(frozen=True)
class Norm:
    """The input of the next product = the norm of x, or x as it is."""

    norm: NormSpec | None


@dataclass(frozen=True)
class Heads:
    """q [T, H, D], k and v [T, G, D] = the product of the input."""

    product: ProductSpec


@dataclass(frozen=True)
class Append:
    """Bound q, k and v by `clip`, norm each head of q and k, turn them by `rope`; k and v go to the lanes.

    Norms may be `over_heads`, of all heads of q and of k at once, or come `after_rope`. With a `temperature` (period,
    scale) queries at position p are then multiplied by 1 + scale ln(1 + floor((p + 1) / period)) (arXiv:2501.19399).
    """

    clip: float | None
    q_norm: NormSpec | None
    k_norm: NormSpec | None
    rope: RopeConfig | None
    over_heads: bool = False
    after_rope: bool = False
    temperature: tuple[float, float] | None = None


@dataclass(frozen=True)
class Attend:
    """Attention of q over the lanes: scores times `scale`, with the terms of `attention.backend.ScoreTerms`.

    `sinks` is the name of a weight [H], None where there are none. With a `chunk`, positions p and q see each other
    only if p // chunk is q // chunk.
    """

    scale: float
    softcap: float | None
    slopes: tuple[float, ...]
    sinks: str | None
    chunk: int | None = None


@dataclass(frozen=True)
class Up:
    """The inside of an MLP: activation(gate) * up where the product has two matrices, else activation(up).

    `curve` are the names of the weights of an activation that has some ("xielu": alpha_p, alpha_n - beta, beta, eps).
    """

    product: ProductSpec
    activation: str
    curve: tuple[str, ...] = ()


@dataclass(frozen=True)
class Add:
    """x += the product, through `norm` if there is one: of what `Attend` made if `of_attention`, else `Up`."""

    product: ProductSpec
    of_attention: bool
    norm: NormSpec | None


@dataclass(frozen=True)
class AddExperts:
    """x += the mixture of experts of the input, through `norm` if there is one; its weights' names begin with `at`."""

    at: str
    norm: NormSpec | None


@dataclass(frozen=True)
class Output:
    """Logits = the product of the norm of x, plus a bias if `biased`, times `scale`, bounded by `softcap`."""

    norm: NormSpec
    scale: float
    softcap: float | None
    biased: bool = False


Part = Norm | Heads | Append | Attend | Up | Add | AddExperts
"""A part of a layer."""
