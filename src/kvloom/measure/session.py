"""Session: all policies on all windows, in an order in which every policy has about as many windows at any time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvloom.engine.engine import Engine
from kvloom.engine.params import SamplingParams
from kvloom.errors import InvalidInputError, UnsupportedError
from kvloom.measure.cost import cost_of
from kvloom.measure.forced import Reference, forced_scores, never
from kvloom.measure.results import Results, Row
from kvloom.measure.window import Window
from kvloom.spec.policy import FULL, PolicySpec

REFERENCE_BYTES = 256 << 20
"""Most bytes of log-probabilities of the full cache."""

MOST_AT_ONCE = 8
"""Most windows that run together: more gain little speed, and stopping a run discards all of them."""


@dataclass(frozen=True)
class Progress:
    """`done` of `total` runs of a window under a policy, and what is being run now; None at the end."""

    done: int
    total: int
    policy: PolicySpec | None


class Session:
    """Measures `policies` (the full cache is always among them) on `windows` into `results`.

    Entries of `results` are not measured again. `cost_runs` windows are also run alone, for times and bytes.
    """

    def __init__(
        self,
        engine: Engine,
        windows: Sequence[Window],
        policies: Sequence[PolicySpec],
        results: Results,
        *,
        cost_runs: int = 2,
        stop: Callable[[], bool] = never,
    ) -> None:
        """Raises what `Engine.check` raises for the first policy that cannot run."""
        self.engine = engine
        self.windows = list(windows)
        self.results = results
        self.cost_runs = min(cost_runs, len(self.windows))
        self.stop = stop
        prompt, follow = self.windows[0].prompt, self.windows[0].follow
        size = len(prompt) + len(follow)
        self.rows = [results.row(policy, size, len(follow)) for policy in dict.fromkeys((FULL, *policies))]
        for row in self.rows:
            check_policy(engine, self.windows[0], row.policy)
        per_window = 4 * len(follow) * engine.runner.model.config.vocab_size
        self.at_once = max(1, min(MOST_AT_ONCE, engine.scheduler.max_num_seqs, REFERENCE_BYTES // per_window))

    def run(self) -> Iterator[Progress]:
        """Yield before each piece of work; ends when all is done or `stop()` is true. Mutates the rows of the results.

        Scores first, a few windows at a time under all policies; then costs, for which the policies take turns.
        """
        first = 0
        while first < len(self.windows):
            end = min(first + self._step(first), len(self.windows))
            missing = [row for row in self.rows if len(row.scores) < end]
            if missing:
                yield from self._scores(first, end, missing)
            if self.stop():
                return
            first = end
        for number in range(self.cost_runs):
            for row in self.rows:
                if len(row.costs) == number:
                    yield self._progress(row.policy)
                    cost = cost_of(self.engine, self.windows[number], row.policy, self.stop)
                    if cost is None:
                        return
                    row.costs.append(cost)
        yield self._progress(None)

    def _step(self, first: int) -> int:
        """Return how many windows from `first` on run together; every row lacks either all of them or none."""
        ahead = [len(row.scores) - first for row in self.rows if len(row.scores) > first]
        return min([self.at_once, *ahead])

    def _scores(self, first: int, end: int, missing: list[Row]) -> Iterator[Progress]:
        """Run windows `first` to `end - 1` under the full cache and all of `missing`, until `stop()` is true."""
        windows, full = self.windows[first:end], self.rows[0]
        reference: Reference = {}
        for row in [full, *(row for row in missing if row is not full)]:
            yield self._progress(row.policy)
            scores = forced_scores(self.engine, windows, row.policy, reference, self.stop)
            if scores is None:
                return
            if len(row.scores) == first:
                row.scores += scores

    def _progress(self, policy: PolicySpec | None) -> Progress:
        done = sum(min(len(row.scores), len(self.windows)) + min(len(row.costs), self.cost_runs) for row in self.rows)
        return Progress(done, len(self.rows) * (len(self.windows) + self.cost_runs), policy)


def check_policy(engine: Engine, window: Window, policy: PolicySpec) -> None:
    """Raise `UnsupportedError`, `DoesNotFitError` or `InvalidInputError` unless `policy` can run on such a window."""
    engine.check(window.prompt, SamplingParams(temperature=0), window.follow, policy)


def runnable(
    engine: Engine, window: Window, policies: Sequence[PolicySpec]
) -> tuple[list[PolicySpec], dict[PolicySpec, str]]:
    """Return those of `policies` that can run on such a window, and for each other one the reason."""
    able: list[PolicySpec] = []
    refused: dict[PolicySpec, str] = {}
    for policy in policies:
        try:
            check_policy(engine, window, policy)
            able.append(policy)
        except UnsupportedError as error:
            refused[policy] = "; ".join(error.reasons)
        except InvalidInputError as error:
            refused[policy] = str(error)
    return able, refused
