"""CompiledWeights: the products and vectors of a decoder, each packed once for the CPU kernels."""

from collections.abc import Iterable

import torch

from kvloom.kernels.cpu import Experts, NormWeights, PackedWeight
from kvloom.models.lowering import lower_layer
from kvloom.models.mixture_weights import MixtureWeights
from kvloom.models.mxfp4 import Mxfp4Weight
from kvloom.models.parts import Add, AddExperts, Heads, NormSpec, ProductSpec, Up
from kvloom.spec.decoder import DecoderConfig


class CompiledWeights:
    """Canonical `tensors`, which are not kept: each product is packed as soon as its matrices have been read.

    Layers multiply in `product`, embedding and output layer in `output_product`; the table of positions is added to
    embeddings, so that it is held in `table_product`, that of the model's dtype.
    """

    def __init__(
        self,
        config: DecoderConfig,
        tensors: Iterable[tuple[str, torch.Tensor | Mxfp4Weight]],
        *,
        product: str,
        output_product: str,
        table_product: str,
    ) -> None:
        self._product = product
        self._head_dim = config.head_dim
        self._packed: dict[ProductSpec, PackedWeight] = {}
        self._tables: dict[str, PackedWeight] = {}
        self._vectors: dict[str, torch.Tensor] = {}
        tables = {"embed": output_product, "positions": table_product}
        output = ["lm_head", "lm_head_bias"] if config.head_bias else ["lm_head"]
        parts = [part for index in range(config.num_layers) for part in lower_layer(config, index)]
        reader = {
            name: part for part in parts if isinstance(part, (Heads, Up, Add)) for name in _names(part.product)
        }  # of each tensor
        self._mixtures = {part.at: MixtureWeights(config, product) for part in parts if isinstance(part, AddExperts)}
        pending: dict[str, torch.Tensor] = {}
        for name, tensor in tensors:
            own = name.rpartition(".")[2]  # in its layer
            mixture = self._mixtures.get(name.removesuffix(own))
            if mixture is not None and mixture.wants(own):
                mixture.add(own, tensor)
                continue
            assert isinstance(tensor, torch.Tensor), f"{name} is in MXFP4 and of no expert"
            if name in tables:
                self._tables[name] = PackedWeight(tensor.contiguous(), tables[name])
            elif name in output:
                pending[name] = tensor
                if all(each in pending for each in output):
                    head, *bias = (pending.pop(each) for each in output)
                    own_bias = bias[0].float() if bias else None
                    self._tables["lm_head"] = PackedWeight(head.contiguous(), output_product, bias=own_bias)
            elif name in reader:
                pending[name] = tensor
                self._pack(reader[name].product, isinstance(reader[name], Up), pending)
            else:  # norms and sinks
                self._vectors[name] = tensor.clone()
        assert not pending, f"unknown weights: {sorted(pending)}"

    def _pack(self, product: ProductSpec, inner: bool, pending: dict[str, torch.Tensor]) -> None:
        """Pack a product if all its tensors are pending; removes them from `pending`."""
        if not all(name in pending for name in _names(product)):
            return
        matrices = [pending.pop(name) for name in product.weights]
        weight = torch.cat(matrices) if len(matrices) > 1 else matrices[0].contiguous()
        biases = [pending.pop(f"{name}_bias").float() for name in product.weights if product.biased]
        bias = torch.cat(biases) if biases else None
        gated = inner and len(matrices) == 2
        self._packed[product] = PackedWeight(weight, self._product, gated=gated, bias=bias)

    @property
    def embedding(self) -> PackedWeight:
        """The embedding [vocab, hidden]."""
        return self._tables["embed"]

    @property
    def output(self) -> PackedWeight:
        """The output layer [vocab, hidden], the same object as the embedding if tied."""
        return self._tables.get("lm_head", self.embedding)

    @property
    def positions(self) -> PackedWeight | None:
        """The table of learned positions [positions, hidden], None where there is none."""
        return self._tables.get("positions")

    def product(self, spec: ProductSpec) -> PackedWeight:
        """Return a product of a layer."""
        return self._packed[spec]

    def mixture(self, part: AddExperts) -> Experts:
        """Return a mixture of experts of a layer."""
        return self._mixtures[part.at].mixture

    def vector(self, name: str | None) -> torch.Tensor | None:
        """Return the vector of that name, None for None."""
        return None if name is None else self._vectors[name]

    def curve(self, part: Up) -> tuple[tuple[float, float, float], ...]:
        """Return alpha_p, alpha_n and beta of xIELU as one tuple, else none; its eps moves results by a millionth."""
        if not part.curve:
            return ()
        above, below, slope, _ = (float(self._vectors[name]) for name in part.curve)
        return ((above, below + slope, slope),)

    def norm(self, spec: NormSpec | None) -> NormWeights | None:
        """Return a norm, None for None."""
        if spec is None:
            return None
        if spec.weight is None:
            return NormWeights(torch.ones(self._head_dim), spec.eps)
        bias = self._vectors[f"{spec.weight}_bias"] if spec.biased else None
        return NormWeights(self._vectors[spec.weight], spec.eps, spec.centred, bias)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights, tied ones once."""
        vectors = sum(w.numel() * w.element_size() for w in self._vectors.values())
        mixtures = sum(mixture.num_bytes for mixture in self._mixtures.values())
        products = sum(packed.num_bytes for packed in (*self._packed.values(), *self._tables.values()))
        return vectors + mixtures + products


def _names(product: ProductSpec) -> list[str]:
    """Return the names of all tensors of a product."""
    return [*product.weights, *(f"{name}_bias" for name in product.weights if product.biased)]
