"""The roofline: bytes and operations of prefill and decode, and the least time that a device needs for them.

A step takes at least `max(bytes / bandwidth, operations / peak)`. Every count is what must be moved or computed once,
so that the times are lower bounds: no real run is faster on that bandwidth and peak.
"""

from dataclasses import dataclass
from functools import cached_property

from kvloom.plan.figure import Figure, Label
from kvloom.plan.memory import device_params
from kvloom.plan.question import Question
from kvloom.spec.format import store_format
from kvloom.spec.kv import LayerKV
from kvloom.spec.layer import Attention, Experts, Latent, Recurrent
from kvloom.spec.model import DTYPE_BYTES, ModelSpec
from kvloom.spec.search import largest


def causal_pairs(tokens: int, window: int | None) -> int:
    """Return the (query, key) pairs of `tokens` causal queries, each reading at most `window` keys and itself first."""
    if window is None or window >= tokens:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window


def bytes_per_weight(model: ModelSpec, dtype: str, experts: bool) -> float:
    """Return the stored bytes of one weight, of routed experts or of the rest of the layers."""
    if model.weight_format is not None and dtype == model.dtype and model.weight_bytes is None:
        covered = experts or model.weight_format.covers == "layers"
        return model.weight_format.bits / 8 if covered else DTYPE_BYTES[dtype]
    return model.stored_weight_bytes(dtype) / model.num_params


@dataclass(frozen=True)
class Roofline:
    """Work and least times of a `Question`, per device."""

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

    def _held_in(self, layer: int, prompt: int, generated: int) -> float:
        """Return `held` in an attention layer without a window, by its index among those; some policies skip layers."""
        if layer < self.question.policy.layers_skipped:
            return float(prompt + generated)
        return self.held(prompt, generated)

    def kv_read_bytes(self, prompt: int, generated: int) -> float:
        """Return the KV bytes that one token of one request reads on one device; shared K/V is read by each reader."""
        kv = self.question.device_kv
        if kv is None:
            return float(self.question.model.state_bytes)
        seen = prompt + generated
        total = 0.0
        for index, layer in enumerate(kv.layers):
            held = self._held_in(index, prompt, generated)
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
        return total + self.question.model.state_bytes

    def _token_bytes(self, layer: LayerKV, encoded: bool) -> float:
        name = self.question.native_store
        if encoded and self.question.policy.store is not None:
            name = self.question.policy.store.name
        block = 32
        return store_format(name).payload_bytes(block, layer.k_width, layer.v_width) / block

    def decode_flops(self, prompt: int, generated: int) -> float:
        """Return the operations of one generated token of one request, all devices together."""
        model = self.question.model
        seen, attending = prompt + generated, 0
        attention = 0.0
        for layer in model.layers:
            keys = float(min(seen, layer.window or seen))
            if layer.window is None and not isinstance(layer.mixer, Recurrent):
                keys = self._held_in(attending, prompt, generated)
            attending += not isinstance(layer.mixer, Recurrent)
            attention += layer.mixer.attention_flops(keys)
        return 2.0 * (model.layer_matrix_params + model.head_params) + attention

    def prefill_flops(self, prompt: int) -> float:
        """Return the operations of one prompt, logits of its last token only, all devices together.

        In the last layer only the last token is counted: the others need only keys and values there, which is little.
        """
        model = self.question.model
        attention = 0.0
        for index, layer in enumerate(model.layers):
            last = index + 1 == len(model.layers)
            pairs = min(prompt, layer.window or prompt) if last else causal_pairs(prompt, layer.window)
            if isinstance(layer.mixer, Latent):
                attention += layer.mixer.expanded_flops(1) * pairs
            elif isinstance(layer.mixer, Attention):
                attention += layer.mixer.attention_flops(1) * pairs
            elif isinstance(layer.mixer, Recurrent):
                attention += layer.mixer.attention_flops(1) * (1 if last else prompt)
        whole = model.layer_matrix_params - model.layers[-1].active_matrix_params(model.hidden_size)
        return 2.0 * (whole * prompt + (model.layer_matrix_params - whole) + model.head_params) + attention

    @property
    def weights_label(self) -> Label:
        """Label of the weight bytes that are read: assumed where the packing is estimated."""
        asked = self.question
        return "assumed" if asked.quantization is not None and asked.packed.obstacles else "exact"

    @property
    def peak_stands_in(self) -> bool:
        """Whether products have 8-bit activations whose peak is not known, so that the peak of the dtype is used.

        Low-bit weights with activations of 16 or 32 bits are multiplied in the dtype.
        """
        return self.question.quantization == "w8a8" and self.question.device.peak("w8a8") is None

    @property
    def _multiplies_fp8(self) -> bool:
        model = self.question.model
        native = model.weight_format is not None and model.weight_format.name == "fp8"
        kept = native and self.question.dtype == model.dtype and self.question.quantization is None
        return kept and self.question.device.peak("float8_e4m3fn") is not None

    @property
    def peak(self) -> float | None:
        """Operations per second; None when not known.

        Weights that a checkpoint keeps in FP8 may be multiplied at the peak of FP8, where the device has one.
        """
        if self._multiplies_fp8:
            return self.question.device.peak("float8_e4m3fn")
        own = self.question.quantization == "w8a8" and not self.peak_stands_in
        return self.question.device.peak("w8a8" if own else self.question.dtype)

    @property
    def speed_label(self) -> Label:
        """Label of the device's speed; a peak of another dtype makes it assumed."""
        return "measured" if self.question.device.measured and not self.peak_stands_in else "assumed"

    def tpot(self, batch: int | None = None, expected: bool = False) -> Figure:
        """Return the least seconds per generated token, for `batch` requests at once: the mean over the output.

        The i-th decode step reads the tokens held after the prompt and i generated tokens. Reads are a concave function
        of i, so the mean of the first and the last step is at most the mean of all steps.
        """
        asked = self.question
        batch = batch or asked.users
        steps = (1, asked.output - 1) if asked.output > 1 else (0,)
        kv = sum(self.kv_read_bytes(asked.prompt, made) for made in steps) / len(steps)
        flops = sum(self.decode_flops(asked.prompt, made) for made in steps) / len(steps)
        return self._time(self.weight_bytes(batch, expected) + batch * kv, batch * flops / asked.devices)

    def ttft(self) -> Figure:
        """Return the least seconds to the first token of one prompt that has the devices to itself."""
        asked = self.question
        return self._time(self.weight_bytes(1), self.prefill_flops(asked.prompt) / asked.devices)

    def _time(self, moved: float, work: float) -> Figure:
        device = self.question.device
        peak = self.peak
        if device.bandwidth is None or peak is None:
            note = f"no peak for {self.question.dtype} in the device table"
            if device.kind == "cpu":
                note = "speed of the device not known; `kvloom plan --probe` measures this machine"
            return Figure(None, "s", "assumed", note)
        memory, arithmetic = moved / device.bandwidth, work / peak
        if memory >= arithmetic:
            return Figure(memory, "s", "measured" if device.measured else "assumed", "lower bound, set by bandwidth")
        if self.peak_stands_in:
            note = f"between bandwidth and the peak of {self.question.dtype}: that of 8-bit activations is not known"
            return Figure(arithmetic, "s", "assumed", note, memory)
        return Figure(arithmetic, "s", self.speed_label, "lower bound, set by arithmetic")

    @cached_property
    def kv_bound_context(self) -> int | None:
        """Context from which a step of all users reads more KV than weights; None when it never does.

        Reads never shrink with the context.
        """
        asked = self.question
        weights = self.weight_bytes(asked.users)
        if asked.users * self.kv_read_bytes(1 << 30, 0) <= weights:
            return None
        return (largest(lambda n: asked.users * self.kv_read_bytes(n, 0) <= weights, 1, 1 << 30) or 0) + 1

    def intensity(self, batch: int) -> float:
        """Return the operations per byte of a decode step of `batch` requests at the full context, on one device."""
        asked = self.question
        generated = max(0, asked.output - 1)
        moved = self.weight_bytes(batch) + batch * self.kv_read_bytes(asked.prompt, generated)
        return batch * self.decode_flops(asked.prompt, generated) / asked.devices / moved

    @property
    def ridge(self) -> float | None:
        """Operations per byte above which the device is bound by arithmetic; None when its speed is not known."""
        peak, bandwidth = self.peak, self.question.device.bandwidth
        return None if peak is None or not bandwidth else peak / bandwidth

    @cached_property
    def compute_bound_batch(self) -> int | None:
        """Fewest requests at which decode is bound by arithmetic; None when KV reads keep it from ever being so."""
        ridge = self.ridge
        if ridge is None or self.intensity(1 << 30) < ridge:
            return None
        return (largest(lambda batch: self.intensity(batch) < ridge, 1, 1 << 30) or 0) + 1
