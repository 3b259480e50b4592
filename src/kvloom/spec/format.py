"""Storage formats by name: the stores that run, and published formats that are planned only."""

from kvloom.errors import InvalidInputError
from kvloom.registry import Registry, nearest
from kvloom.spec.store import ALIASES, INT8, NATIVE_STORE, STORES, Side, StoreSpec

PLANNED: Registry[StoreSpec] = Registry("store")
"""Published formats; a store of the same name in `STORES` takes precedence."""

INT4 = Side(4, scale_bytes=2)
"""Symmetric codes with a 16-bit scale for each token."""

PLANNED.register("int4", StoreSpec.alike("int4", INT4, residual=32))
PLANNED.register("k8v4", StoreSpec("k8v4", INT8, INT4, residual=32))
# K is grouped over tokens per channel, V over channels per token (KIVI, arXiv 2402.02750): both come to the same bytes
# when the block size is a multiple of the group.
PLANNED.register("kivi4", StoreSpec.alike("kivi4", Side(4, group=32, group_bytes=4), residual=128))
PLANNED.register("kivi2", StoreSpec.alike("kivi2", Side(2, group=32, group_bytes=4), residual=128))


SERVED_STORES = tuple(name for name in STORES if name not in NATIVE_STORE.values())
"""Stores that the policy of a request may name; the native store needs no name."""


def is_store(name: str) -> bool:
    """Return whether `name` is a store, another spelling of one, or a planned format."""
    return name in STORES or name in PLANNED or name in ALIASES


def runs(name: str) -> bool:
    """Return whether requests can be served with K and V in this store: a native one, or one that policies may name."""
    return name in SERVED_STORES or name in NATIVE_STORE.values()


def store_names() -> list[str]:
    """Return all names, stores first."""
    return [*STORES, *(name for name in PLANNED if name not in STORES)]


def store_format(name: str) -> StoreSpec:
    """Return the format called `name` or so spelt; raises `InvalidInputError` naming the nearest one."""
    name = ALIASES.get(name, name)
    if name in STORES:
        return STORES.get(name)
    if name in PLANNED:
        return PLANNED.get(name)
    known = store_names()
    raise InvalidInputError(f"unknown store {name!r}{nearest(name, known)}; known: {', '.join(known)}")


def bits_per_element(name: str, head_dim: int) -> float:
    """Return the stored bits per K or V element of full blocks at `head_dim`, scales included."""
    block = 32
    return store_format(name).payload_bytes(block, head_dim, head_dim) * 8 / (2 * block * head_dim)
