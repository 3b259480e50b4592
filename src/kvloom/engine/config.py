"""EngineConfig: the options of an engine, and the resolution of "auto" on this machine. Torch-free."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from kvloom.errors import DoesNotFitError, InvalidInputError
from kvloom.policies.allowlist import EVERYTHING, AllowList
from kvloom.registry import nearest
from kvloom.spec.footprint import request_footprint
from kvloom.spec.format import SERVED_STORES
from kvloom.spec.kv import KVSpec
from kvloom.spec.packing import QUANTIZATIONS
from kvloom.spec.policy import FULL, PolicySpec, Term
from kvloom.spec.search import largest
from kvloom.spec.slabs import longest_request, sure_bytes
from kvloom.spec.store import ALIASES, SLAB_BYTES
from kvloom.units import GIB, format_bytes

DTYPES = ("auto", "bfloat16", "float16", "float32")
BACKENDS = ("auto", "cpu", "eager")
"""cpu: fused steps in C++ over packed weights; eager: the reference decoder in torch; auto: cpu where it can."""

KV_CACHE_DTYPES = ("auto", *SERVED_STORES, *ALIASES)
"""auto: as the model computes them; else the store in which complete blocks of K and V are kept."""

MAX_KV_BYTES_BY_DEFAULT = 4 * GIB


@dataclass(frozen=True)
class EngineConfig:
    """Options of an engine, checked on construction (`InvalidInputError`); None and "auto" are resolved at start.

    `kv_cache_memory_bytes` is the arena; on the CPU its pages are committed only when written. `max_num_batched_tokens`
    is the budget of one step and so the size of a prefill chunk. `threads` compute the model, in the whole process.
    """

    dtype: str = "auto"
    max_model_len: int | None = None
    kv_cache_memory_bytes: int | None = None
    block_size: int = 16
    enable_prefix_caching: bool = True
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    seed: int = 0
    backend: str = "auto"
    quantization: str | None = None
    threads: int | None = None
    kv_policy: PolicySpec = FULL
    kv_cache_dtype: str = "auto"
    allow_kv_policies: AllowList = EVERYTHING

    def __post_init__(self) -> None:
        for kind, value, known in (
            ("dtype", self.dtype, DTYPES),
            ("backend", self.backend, BACKENDS),
            ("quantization", self.quantization, (None, *QUANTIZATIONS)),
            ("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES),
        ):
            if value not in known:
                names = [name for name in known if name is not None]
                raise InvalidInputError(
                    f"unknown {kind} {value!r}{nearest(str(value), names)}; known: {', '.join(names)}"
                )
        for name, least in (
            ("max_model_len", 2),
            ("kv_cache_memory_bytes", SLAB_BYTES),
            ("block_size", 1),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("seed", 0),
            ("threads", 1),
        ):
            value = getattr(self, name)
            if value is None and name in ("max_model_len", "kv_cache_memory_bytes", "threads"):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidInputError(f"{name} must be an integer, not {value!r}")
            if value < least:
                raise InvalidInputError(f"{name} is {value}; it must be at least {least}")

    @property
    def kv_store(self) -> Term | None:
        """The store of requests whose policy has none; None for the native one."""
        return None if self.kv_cache_dtype == "auto" else PolicySpec.parse(self.kv_cache_dtype).store

    @property
    def stored_policy(self) -> PolicySpec:
        """The policy of requests that name none, with its store."""
        return self.kv_policy if self.kv_policy.store is not None else replace(self.kv_policy, store=self.kv_store)

    def resolve_dtype(self) -> str:
        """Return the dtype to run in: bfloat16 where the processor computes in it, else float32."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if processor_has_bfloat16() else "float32"

    def resolve_kv_bytes(self, spec: KVSpec, max_position: int) -> int:
        """Return the size of the arena: as asked, else what all sequences could use, within half the free memory."""
        if self.kv_cache_memory_bytes is not None:
            return self.kv_cache_memory_bytes
        length = self.max_model_len or max_position
        # one slab of slack for each block size, because a slab serves one size at a time
        most = self.max_num_seqs * spec.request_bytes(length, self.max_num_batched_tokens) + 4 * SLAB_BYTES
        limit = min(MAX_KV_BYTES_BY_DEFAULT, available_memory_bytes() // 2)
        return max(SLAB_BYTES, min(most, limit) // SLAB_BYTES * SLAB_BYTES)

    def resolve_max_model_len(self, spec: KVSpec, max_position: int, kv_bytes: int) -> int:
        """Return the longest sequence that keeps all its tokens: as asked, else what model and arena allow.

        Under a policy of its own that evicts, the engine may be asked for more than fits uncompressed; each request is
        then checked by itself. Raises `InvalidInputError` beyond the model's length and `DoesNotFitError`.
        """
        if self.max_model_len is not None and self.max_model_len > max_position:
            raise InvalidInputError(
                f"max_model_len is {self.max_model_len}; the model was made for at most {max_position} positions"
            )
        fits = min(self._longest_request(spec, kv_bytes), max_position)
        if fits < 2:
            raise DoesNotFitError(
                f"a KV cache of {format_bytes(kv_bytes)} holds {fits} tokens of this model "
                f"({format_bytes(spec.request_bytes(2, 2))} for the shortest request). Raise --kv-cache-memory-bytes"
            )
        if self.max_model_len is None:
            return fits
        if self.max_model_len > fits:
            if self.kv_policy.evicts:
                return fits
            raise DoesNotFitError(
                f"one sequence of {self.max_model_len} tokens needs "
                f"{format_bytes(spec.request_bytes(self.max_model_len, self.max_num_batched_tokens))} of KV cache; "
                f"there are {format_bytes(kv_bytes)}. Lower --max-model-len to {fits} or raise --kv-cache-memory-bytes"
            )
        return self.max_model_len

    def _longest_request(self, spec: KVSpec, kv_bytes: int) -> int:
        """Return the longest request that fits alone if all of it but a token is the prompt."""
        chunk, store = self.max_num_batched_tokens, self.stored_policy.store
        native = longest_request(spec, kv_bytes, chunk)
        if store is None:
            return native
        sure, policy = sure_bytes(spec, kv_bytes, [store.name]), PolicySpec(store=store)
        return largest(lambda n: request_footprint(spec, policy, n - 1, 1, chunk).peak.high <= sure, 2, native) or 0


def processor_has_bfloat16() -> bool:
    """Return whether this CPU has bfloat16 dot products (AVX512-BF16, AMX, Arm BF16)."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def available_memory_bytes() -> int:
    """Return the memory available without swapping: MemAvailable where the kernel reports it, else free pages."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: ask the C library below
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
