"""AllowList: which policies requests may ask for."""

from collections.abc import Sequence

from kvloom.errors import UnsupportedError
from kvloom.spec.policy import PolicySpec


class AllowList:
    """Names of selectors (`snapkv`: with any arguments and additions) and whole policies (exactly those).

    None allows everything. The engine's own policy is always allowed, and so is `full`, which costs no more.
    """

    def __init__(self, entries: Sequence[str] | None, own: PolicySpec | None = None) -> None:
        """Read `entries`; raises `InvalidInputError` for one that is no policy."""
        self._names: set[str] = {"full"}
        self._whole: set[str] = set()
        self._all = entries is None
        for entry in entries or ():
            if entry.strip().isidentifier():
                self._names.add(PolicySpec.selector_named(entry.strip()))
            else:
                self._whole.add(str(PolicySpec.parse(entry)))
        if own is not None:
            self._whole.add(str(own))

    def check(self, spec: PolicySpec, asked: str) -> None:
        """Raise `UnsupportedError` unless requests may ask for `spec`, which they spelled `asked`."""
        if self._all or spec.selector.name in self._names or str(spec) in self._whole:
            return
        known = ", ".join(sorted(self._names) + sorted(self._whole))
        raise UnsupportedError(f"policy {asked!r}", [f"this engine allows only: {known}"])
