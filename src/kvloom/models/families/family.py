"""Family: the config and the names of weights of a kind of model. All differences between families are data."""

from collections.abc import Iterator
from dataclasses import dataclass

from kvloom.models.families.weight import Weight
from kvloom.spec.decoder import DecoderConfig
from kvloom.spec.families.family import FamilyConfig


@dataclass(frozen=True)
class Family:
    """One kind of model that runs.

    `config` reads its config.json. `weights` lists every tensor; `hf_prefixes` are tried in turn where a checkpoint
    wraps the text model, as (prefix there, prefix here); names in a file that start with one of `ignored` belong to
    parts that text does not use.
    """

    config: FamilyConfig
    weights: tuple[Weight, ...]
    hf_prefixes: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name in the registry, of the config and of the weights."""
        return self.config.name

    def source_of(self, name: str) -> str:
        """Return the name in safetensors files of the weight `name` outside the layers."""
        return next(weight.hf for weight in self.weights if weight.name == name)

    def expected(self, config: DecoderConfig) -> Iterator[tuple[str, int, Weight]]:
        """Yield (canonical name, layer, weight) of every tensor that a model of `config` has, in loading order.

        `layer` is 0 for tensors outside the layers.
        """
        for weight in self.weights:
            if weight.when(config) and not weight.per_layer:
                yield weight.name, 0, weight
        for layer in range(config.num_layers):
            for weight in self.weights:
                if weight.when(config) and weight.per_layer and weight.on(config.layers[layer]):
                    yield weight.name.format(i=layer), layer, weight
