"""AllowList: the policies that requests may name. Torch-free."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvloom.errors import UnsupportedError
from kvloom.spec.method import METHODS
from kvloom.spec.policy import FULL, PolicySpec


@dataclass(frozen=True)
class AllowList:
    """Names of selectors (`snapkv`: with any arguments and additions) and whole policies (exactly those).

    `everything` allows all. The engine's own policy is always allowed, and so is `full` without additions.
    """

    names: frozenset[str] = frozenset()
    whole: frozenset[PolicySpec] = frozenset()
    everything: bool = False

    @classmethod
    def parse(cls, entries: Sequence[str]) -> "AllowList":
        """Return the list that `entries` spell; raises `InvalidInputError` for one that is no policy."""
        given = [entry.strip() for entry in entries]
        names = frozenset(entry for entry in given if entry in METHODS and METHODS.get(entry).role == "selector")
        return cls(names, frozenset(PolicySpec.parse(entry) for entry in given if entry not in names))

    def check(self, asked: PolicySpec, own: PolicySpec) -> None:
        """Raise `UnsupportedError` unless requests may ask for `asked` of an engine whose own policy is `own`."""
        if self.everything or asked.selector.name in self.names or asked in {*self.whole, FULL, own}:
            return
        names = {*self.names, str(FULL)}
        known = ", ".join(sorted(names) + sorted({*map(str, self.whole), str(own)} - names))
        raise UnsupportedError(f"policy {str(asked)!r}", [f"this engine allows only: {known}"])


EVERYTHING = AllowList(everything=True)
