"""Question: the complete and checked input of a plan."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from kvloom.errors import InvalidInputError, UnsupportedError
from kvloom.registry import nearest
from kvloom.spec.encoding import encoded_only
from kvloom.spec.hardware import DeviceSpec
from kvloom.spec.kernels import BLOCK_SLOTS
from kvloom.spec.kv import KVSpec, LayerKV
from kvloom.spec.layer import Attention, Latent
from kvloom.spec.model import DTYPE_BYTES, ModelSpec
from kvloom.spec.packedmodel import PackedModel, packed_model
from kvloom.spec.packing import QUANTIZATIONS
from kvloom.spec.policy import FULL, PolicySpec
from kvloom.spec.store import NATIVE_STORE

DEFAULT_BLOCK_SIZE = 16
DEFAULT_CHUNK = 2048
DEFAULT_UTILIZATION = 0.9


@dataclass(frozen=True)
class Question:
    """A model on `devices` equal devices, `users` requests at once of `prompt` + `output` tokens each.

    `chunk` is the most tokens that one step processes, `utilization` the share of a device's memory that may be used,
    `target_ttft` and `target_tpot` are seconds, `quantization` is how the CPU's kernels keep weights, None in `dtype`.
    Raises `InvalidInputError` for numbers out of range and `UnsupportedError` when the model cannot be divided over the
    devices or its weights cannot be quantised so.
    """

    model: ModelSpec
    device: DeviceSpec
    prompt: int
    output: int
    users: int = 1
    policy: PolicySpec = FULL
    dtype: str = "bfloat16"
    devices: int = 1
    block_size: int = DEFAULT_BLOCK_SIZE
    chunk: int = DEFAULT_CHUNK
    utilization: float = DEFAULT_UTILIZATION
    target_ttft: float | None = None
    target_tpot: float | None = None
    quantization: str | None = None

    def __post_init__(self) -> None:
        least_of = {"prompt": 1, "output": 0, "users": 1, "devices": 1, "block_size": 1, "chunk": 1}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise InvalidInputError(f"--{flag} is {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.utilization <= 1:
            raise InvalidInputError(f"--gpu-memory-utilization is {self.utilization}; it must be above 0, at most 1")
        for name in ("target_ttft", "target_tpot"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidInputError(f"--{name.replace('_', '-')} is {value}; it must be above 0 seconds")
        if self.dtype not in DTYPE_BYTES:
            hint = nearest(self.dtype, list(DTYPE_BYTES))
            raise InvalidInputError(f"unknown dtype {self.dtype!r}{hint}; known: {', '.join(DTYPE_BYTES)}")
        if self.quantization is not None:
            self._check_quantization(self.quantization)
        if self.devices > 1:
            self._check_division()
        object.__setattr__(self, "policy", encoded_only(self.policy, self.native_store))

    def _check_quantization(self, name: str) -> None:
        if name not in QUANTIZATIONS:
            hint = nearest(name, list(QUANTIZATIONS))
            raise InvalidInputError(f"unknown quantization {name!r}{hint}; known: {', '.join(QUANTIZATIONS)}")
        applies = {
            f"its kernels run on CPUs, not on {self.device.name}": self.device.kind != "cpu",
            f"its kernels compute in 16 or 32 bits, not in {self.dtype}": self.dtype not in NATIVE_STORE,
            f"its kernels take blocks of a multiple of {BLOCK_SLOTS} tokens, not of {self.block_size}": (
                self.block_size % BLOCK_SLOTS > 0
            ),
        }
        reasons = [reason for reason, there in applies.items() if there]
        if reasons:
            raise UnsupportedError(f"cannot run {self.model.name} with --quantization {name}", reasons)

    def _check_division(self) -> None:
        reasons: list[str] = []
        for layer in self.model.layers:
            mixer = layer.mixer
            if not isinstance(mixer, (Attention, Latent)):
                continue
            if mixer.num_heads % self.devices:
                reasons.append(f"{mixer.num_heads} query heads are not divisible by {self.devices}")
            heads = mixer.num_kv_heads if isinstance(mixer, Attention) else 1
            if heads % self.devices and self.devices % heads:
                reasons.append(f"{heads} KV heads neither divide {self.devices} nor are divided by it")
        if reasons:
            what = f"cannot run {self.model.name} with tensor parallelism over {self.devices} devices"
            raise UnsupportedError(what, list(dict.fromkeys(reasons)))

    @property
    def context(self) -> int:
        """Tokens of one request, prompt and output."""
        return self.prompt + self.output

    @property
    def native_store(self) -> str:
        """The store that holds K and V as the model computes them; 8-bit weights compute in bfloat16."""
        return NATIVE_STORE.get(self.dtype, "bf16")

    @cached_property
    def packed(self) -> PackedModel:
        """The weights as the CPU's kernels hold them."""
        return packed_model(self.model, self.native_store, self.quantization)

    @property
    def whole_kv(self) -> KVSpec | None:
        """Lanes of the whole model, None when it has no keys and values."""
        return lanes_of(self.model.layer_kv, self.block_size, self.native_store, 1) if self.model.kv_layers else None

    @property
    def device_kv(self) -> KVSpec | None:
        """Lanes that one device holds: KV heads are divided, and replicated where there are fewer than devices."""
        if not self.model.kv_layers:
            return None
        return lanes_of(self.model.layer_kv, self.block_size, self.native_store, self.devices)

    def with_context(self, context: int) -> "Question":
        """Return the question for requests of `context` tokens, the output kept where it still leaves a prompt."""
        output = min(self.output, context - 1)
        return replace(self, prompt=context - output, output=output)


@lru_cache(maxsize=256)
def lanes_of(layers: tuple[LayerKV, ...], block_size: int, store: str, devices: int) -> KVSpec:
    """Return the lanes that one of `devices` devices holds, the same object for the same question."""
    if devices > 1:
        layers = tuple(replace(kv, num_lanes=max(1, kv.num_lanes // devices)) for kv in layers)
    return KVSpec(layers, block_size, store)
