"""MixtureWeights: the experts of one layer, each packed once for the CPU kernels."""

import torch

from kvloom.kernels.cpu import Experts, PackedWeight, Routing
from kvloom.models.mxfp4 import Mxfp4Weight
from kvloom.spec.decoder import DecoderConfig

Stored = torch.Tensor | Mxfp4Weight

_GATE_UP, _DOWN, _SHARED = (
    ("experts_gate", "experts_up"),
    ("experts_down",),
    ("shared_gate", "shared_up", "shared_down"),
)


class MixtureWeights:
    """Weights of one mixture: gate and up, and down, are packed as soon as they are complete, and then released.

    Experts multiply in `product`; those that come in MXFP4 stay so. The router is held in float32.
    """

    def __init__(self, config: DecoderConfig, product: str) -> None:
        assert config.experts is not None
        self._config, self._experts, self._product = config, config.experts, product
        biased = self._experts.bias
        self._groups = [_with_biases(_GATE_UP, biased), _with_biases(_DOWN, biased)]
        if self._experts.shared_size:
            self._groups.append(_SHARED)
        self._small = ["router"]
        self._small += ["router_bias"] if biased else []
        self._small += ["router_selection_bias"] if self._experts.selection_bias else []
        self._small += ["shared_router"] if self._experts.shared_gate else []
        self._vectors: dict[str, torch.Tensor] = {}
        self._pending: dict[str, Stored] = {}
        self._packed: dict[str, list[PackedWeight]] = {}  # of each expert, by the first name of a group
        self._shared: tuple[PackedWeight, PackedWeight] | None = None
        self._router: PackedWeight | None = None

    def wants(self, name: str) -> bool:
        """Return whether a weight of the layer belongs to its mixture."""
        return name in self._small or any(name in group for group in self._groups)

    def add(self, name: str, tensor: Stored) -> None:
        """Take a weight [experts, out, in] of the mixture, a bias [experts, out] or one of the router."""
        if name in self._small:
            assert isinstance(tensor, torch.Tensor)
            self._vectors[name] = tensor.float()
            if all(each in self._vectors for each in self._small):
                self._pack_router()
            return
        self._pending[name] = tensor
        group = next(group for group in self._groups if name in group)
        if all(each in self._pending for each in group):
            self._pack({each: self._pending.pop(each) for each in group})

    def _pack_router(self) -> None:
        vectors = self._vectors
        rows = [vectors["router"], *(vectors[name] for name in ("shared_router",) if name in vectors)]
        self._router = PackedWeight(torch.cat(rows), "fp32", bias=vectors.get("router_bias"))

    def _pack(self, given: dict[str, Stored]) -> None:
        if "shared_down" in given:
            gate, up, down = (given[name] for name in _SHARED)
            self._shared = self._packed_of([gate, up], []), self._packed_of([down], [])
            return
        names = [name for name in given if not name.endswith("_bias")]
        biases = [given[f"{name}_bias"] for name in names if f"{name}_bias" in given]
        self._packed[names[0]] = [
            self._packed_of([given[name][expert] for name in names], [bias[expert] for bias in biases])
            for expert in range(self._experts.count)
        ]

    def _packed_of(self, matrices: list[Stored], biases: list[Stored]) -> PackedWeight:
        """Pack matrices [out, in], their rows one below the other; two are gate and up."""
        vectors = [bias.float() for bias in biases if isinstance(bias, torch.Tensor)]
        bias, gated = torch.cat(vectors) if vectors else None, len(matrices) == 2
        packed = [matrix for matrix in matrices if isinstance(matrix, Mxfp4Weight)]
        if packed:
            product = "mxfp4" if self._product == "bf16" else "mxfp4_fp32"
            codes, exponents = (
                torch.cat(parts) for parts in zip(*((m.codes, m.exponents) for m in packed), strict=True)
            )
            return PackedWeight.of_mxfp4(codes, exponents, product, gated=gated, bias=bias)
        plain = [matrix for matrix in matrices if isinstance(matrix, torch.Tensor)]
        return PackedWeight(torch.cat(plain), self._product, gated=gated, bias=bias)

    @property
    def mixture(self) -> Experts:
        """The mixture, once all of its weights were added."""
        assert self._router is not None and not self._pending, f"weights are missing beside {sorted(self._pending)}"
        experts, bias = self._experts, self._vectors.get("router_selection_bias")
        routing = Routing(
            experts.per_token, experts.sigmoid, experts.normalise, experts.scale, experts.groups, experts.kept_groups,
            experts.group_best, bias, experts.jitter, experts.scale_input,
        )  # fmt: skip
        pairs = list(zip(self._packed[_GATE_UP[0]], self._packed[_DOWN[0]], strict=True))
        return Experts(
            self._router,
            pairs,
            routing,
            activation=self._config.activation,
            clamp=experts.clamp,
            shared=self._shared,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights, the router's in float32."""
        shared = self._shared or ()
        routers = [] if self._router is None else [self._router]
        packed = [*routers, *shared, *(weight for each in self._packed.values() for weight in each)]
        bias = self._vectors.get("router_selection_bias")
        total: int = sum(weight.num_bytes for weight in packed) + (0 if bias is None else 4 * bias.numel())
        return total


def _with_biases(names: tuple[str, ...], biased: bool) -> tuple[str, ...]:
    return (*names, *(f"{name}_bias" for name in names)) if biased else names
