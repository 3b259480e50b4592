"""ConfigReader: typed access to a checkpoint's config that collects every fault and reports all at once."""

from typing import Any

from kvloom.errors import CheckpointError, UnsupportedError


class ConfigReader:
    """Reads `raw` over `defaults`; `finish` raises one error that names all missing, malformed or refused entries.

    `read` holds the entries that were asked for.
    """

    def __init__(self, family: str, raw: dict[str, Any], defaults: dict[str, Any]) -> None:
        self.family = family
        self.raw = raw
        self._values = {**defaults, **raw}
        self.read: set[str] = set()
        self._wrong: list[str] = []
        self._refused: list[str] = []

    def get(self, key: str) -> Any:
        """Return the raw entry, or None, and record that it was read."""
        self.read.add(key)
        return self._values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer; an absent or null entry is `default`, or a fault when that is None."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            self.wrong(key, "a positive integer", value)
            return 1
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive finite number; an absent or null entry is `default`, or a fault when that is None."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self.wrong(key, "a positive number", value)
            return 1.0
        return float(value)

    def flag(self, key: str) -> bool:
        """Return a boolean; an absent or null entry is False."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            self.wrong(key, "true or false", value)
        return bool(value)

    def choice(self, key: str, known: dict[str, str]) -> str:
        """Return what `known` maps the entry to; any other entry is refused."""
        value = self.get(key)
        if value not in known:
            self.refuse(f"{key} {value!r} (supported: {', '.join(known)})")
            return next(iter(known.values()))
        return known[value]

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Return a token id or a list of them as a tuple; an absent or null entry is empty."""
        value = self.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            self.wrong(key, "a token id or a list of them", value)
            return ()
        return tuple(dict.fromkeys(i for i in ids if i >= 0))

    def wrong(self, key: str, expected: str, value: object) -> None:
        """Record that an entry is malformed."""
        got = "missing" if value is None else f"{value!r}"
        self._wrong.append(f"{key} is {got}, expected {expected}")

    def refuse(self, reason: str) -> None:
        """Record a property that kvloom does not support."""
        self._refused.append(reason)

    def refuse_if_set(self, *keys: str) -> None:
        """Refuse each entry that is present and neither null, false nor zero."""
        for key in keys:
            if self.get(key):
                self.refuse(f"{key} {self.get(key)!r}")

    @property
    def refused(self) -> tuple[str, ...]:
        """Reasons of refusal so far."""
        return tuple(self._refused)

    def check_entries(self) -> None:
        """Raise `CheckpointError` naming all missing and malformed entries, if there are any."""
        if self._wrong:
            raise CheckpointError(
                f"the config of this {self.family} model is malformed: {'; '.join(self._wrong)}. Fetch the model again"
            )

    def finish(self) -> None:
        """Raise `CheckpointError` for malformed entries, else `UnsupportedError` for refused ones, else nothing."""
        self.check_entries()
        if self._refused:
            raise UnsupportedError(f"this {self.family} model cannot run here", self._refused)
