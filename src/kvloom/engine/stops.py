"""StopStrings: finds the first of several strings in a text that arrives in pieces (Aho and Corasick 1975)."""

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """An automaton over `stops` that has read some text; each sequence has its own.

    After each character it is in the state of the longest suffix of the text that begins a stop string, so one
    look-up a character finds every occurrence, however the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match: list[str | None] = [None]
        for stop in stops:
            self._insert(stop)
        self._fallback = self._link()
        self._state = 0

    def _insert(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._match.append(None)
            state = self._next[state][character]
        self._match[state] = stop

    def _link(self) -> list[int]:
        """Return, for each state, the state of its longest proper suffix; matches of suffixes are inherited."""
        fallback = [0] * len(self._next)
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._next[state].items():
                other = fallback[state]
                while other and character not in self._next[other]:
                    other = fallback[other]
                fallback[child] = self._next[other].get(character, 0)
                self._match[child] = self._match[child] or self._match[fallback[child]]
                queue.append(child)
        return fallback

    @property
    def num_undecided(self) -> int:
        """Characters at the end of the text read so far that may begin a stop string."""
        state = self._state
        while state and not self._next[state]:
            state = self._fallback[state]
        return self._depth[state]

    def read(self, character: str) -> str | None:
        """Read one character; return the longest stop string that ends with it, or None."""
        state = self._state
        while state and character not in self._next[state]:
            state = self._fallback[state]
        self._state = self._next[state].get(character, 0)
        return self._match[self._state]
