"""AllowList: the policies that requests may name. Torch-free."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvloom.errors import UnsupportedError
from kvloom.spec.policy import FULL, PolicySpec


@dataclass(frozen=True)
class AllowList:
    """Names of selectors (`snapkv`: with any arguments and additions) and whole policies (exactly those).

    `everything` allows all. The engine's own policy is always allowed, and so is `full`, which costs no more.
    """

    names: frozenset[str] = frozenset()
    whole: frozenset[PolicySpec] = frozenset()
    everything: bool = False

    @classmethod
    def parse(cls, entries: Sequence[str]) -> "AllowList":
        """Return the list that `entries` spell; raises `InvalidInputError` for one that is no policy."""
        names = [entry.strip() for entry in entries if entry.strip().isidentifier()]
        whole = [entry for entry in entries if not entry.strip().isidentifier()]
        return cls(frozenset(map(PolicySpec.selector_named, names)), frozenset(map(PolicySpec.parse, whole)))

    def check(self, asked: PolicySpec, own: PolicySpec) -> None:
        """Raise `UnsupportedError` unless requests may ask for `asked` of an engine whose own policy is `own`."""
        names = {*self.names, FULL.selector.name}
        if self.everything or asked.selector.name in names or asked in self.whole or asked == own:
            return
        known = ", ".join(sorted(names) + sorted({*map(str, self.whole), str(own)} - names))
        raise UnsupportedError(f"policy {str(asked)!r}", [f"this engine allows only: {known}"])


EVERYTHING = AllowList(everything=True)
