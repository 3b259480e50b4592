"""Reads: the bytes that a step must read at least: weights, and the K and V that its tokens attend to."""

from dataclasses import dataclass
from functools import cached_property

from kvloom.plan.figure import Label
from kvloom.plan.process import device_params
from kvloom.plan.question import Question
from kvloom.spec.format import store_format
from kvloom.spec.kv import LayerKV
from kvloom.spec.layer import Experts
from kvloom.spec.model import DTYPE_BYTES, ModelSpec


def bytes_per_weight(model: ModelSpec, dtype: str, experts: bool) -> float:
    """Return the stored bytes of one weight, of routed experts or of the rest of the layers."""
    if model.weight_format is not None and dtype == model.dtype and model.weight_bytes is None:
        covered = experts or model.weight_format.covers == "layers"
        return model.weight_format.bits / 8 if covered else DTYPE_BYTES[dtype]
    return model.stored_weight_bytes(dtype) / model.num_params


@dataclass(frozen=True)
class Reads:
    """Least bytes that the steps of a `Question` read on one device."""

    question: Question

    @cached_property
    def _share(self) -> float:
        asked = self.question
        return 1.0 if asked.devices == 1 else device_params(asked.model, asked.devices) / asked.model.num_params

    @cached_property
    def _weight_widths(self) -> tuple[float, float, float]:
        """Bytes that are read for one weight of routed experts, of the rest of the layers, and of the output head."""
        asked, model = self.question, self.question.model
        if asked.quantization is not None:
            of_layers = asked.packed.bytes_per_layer_weight
            return of_layers, of_layers, asked.packed.bytes_per_head_weight
        of_rest = bytes_per_weight(model, asked.dtype, False)
        of_head = DTYPE_BYTES[asked.dtype] if model.weight_bytes is None else of_rest
        return bytes_per_weight(model, asked.dtype, True), of_rest, of_head

    def weight_bytes(self, batch: int, expected: bool = False) -> float:
        """Return the weight bytes that one step of `batch` tokens reads on one device.

        Of experts, at least those of one token; when `expected`, those that a uniform choice touches on average.
        """
        model = self.question.model
        routed = 0.0
        for layer in model.layers:
            if isinstance(layer.mlp, Experts):
                mlp = layer.mlp
                touched = float(mlp.per_token)
                if expected:
                    touched = mlp.num_experts * (1 - (1 - mlp.per_token / mlp.num_experts) ** batch)
                routed += touched * mlp.expert_params(model.hidden_size)
        per_token = sum(
            layer.mlp.per_token * layer.mlp.expert_params(model.hidden_size)
            for layer in model.layers
            if isinstance(layer.mlp, Experts)
        )
        of_experts, of_rest, of_head = self._weight_widths
        rest = (model.layer_matrix_params - per_token) * of_rest
        return (routed * of_experts + rest + model.head_params * of_head) * self._share

    @property
    def weights_label(self) -> Label:
        """Label of the weight bytes that are read: assumed where the packing is estimated."""
        asked = self.question
        return "assumed" if asked.quantization is not None and asked.packed.obstacles else "exact"

    def held(self, prompt: int, generated: int) -> float:
        """Return the fewest tokens that a lane without a window holds on average after `generated` tokens.

        Where the data decides (thresholds, policies chosen per head) no tokens are counted, so that the bound holds.
        """
        policy = self.question.policy
        kept = policy.tokens_kept(prompt)
        if kept is None or policy.sharing.acts_always:
            return 0.0
        if not policy.evicts or not policy.when.while_decoding:
            return float(kept + generated)
        goal = policy.tokens_kept(1 << 62) if policy.selector.get("keep") is None else kept
        return float(min(kept + generated, max(kept, goal or kept)))

    def held_in(self, layer: int, prompt: int, generated: int) -> float:
        """Return `held` in an attention layer without a window, by its index among those; some policies skip layers."""
        if layer < self.question.policy.layers_skipped:
            return float(prompt + generated)
        return self.held(prompt, generated)

    def kv_read_bytes(self, prompt: int, generated: int) -> float:
        """Return the KV bytes that one token of one request reads on one device; shared K/V is read by each reader."""
        kv = self.question.device_kv
        if kv is None:
            return self._state_bytes
        seen = prompt + generated
        total = 0.0
        for index, layer in enumerate(kv.layers):
            held = self.held_in(index, prompt, generated)
            origin = layer if layer.source is None else kv.layers[layer.source]
            if layer.window is not None:
                total += layer.num_lanes * min(seen, layer.window) * self._token_bytes(origin, encoded=False)
                continue
            native = held
            if self.question.policy.store is not None:
                term = self.question.policy.store
                native = min(held, term.number("sinks") + term.number("residual"))
            total += layer.num_lanes * (
                native * self._token_bytes(origin, encoded=False)
                + (held - native) * self._token_bytes(origin, encoded=True)
            )
        return total + self._state_bytes

    @property
    def _state_bytes(self) -> float:
        """Bytes of recurrent state that a device reads at least: a share, because an engine may divide it."""
        return self.question.model.state_bytes / self.question.devices

    def _token_bytes(self, layer: LayerKV, encoded: bool) -> float:
        name = self.question.native_store
        if encoded and self.question.policy.store is not None:
            name = self.question.policy.store.name
        block = 32
        return store_format(name).payload_bytes(block, layer.k_width, layer.v_width) / block
