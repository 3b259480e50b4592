"""Request and Sequence: a prompt with its options, and each of its answers in progress. Torch-free."""

import enum
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvloom.cache.prefix import PrefixChain
from kvloom.engine.params import SamplingParams
from kvloom.errors import RequestFailedError

if TYPE_CHECKING:
    from kvloom.engine.beam import BeamSearch
    from kvloom.engine.detokenizer import IncrementalDetokenizer
    from kvloom.engine.logits_processors import LogitsProcessor
    from kvloom.engine.occurrences import Occurrences
    from kvloom.policies.encoding import Encoding
    from kvloom.policies.eviction import Eviction


class Status(enum.Enum):
    """State of a sequence."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class Logprob:
    """Log-probability of one token, its rank (1 = most likely), from the raw logits."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class Timing:
    """Times of a request's arrival, first work, first and newest token: `time.monotonic()` seconds."""

    arrived: float
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None


@dataclass(eq=False)
class Sequence:
    """One answer: its tokens, its row set in the lane table while it runs, and why it ended.

    `token_ids` holds prompt and output; `row` is None unless running. `num_published` blocks are in the prefix index.
    `eviction` and `encoding` carry out its cache policy, where that evicts and where it has a store; `kv_spread` are
    its shortest and longest lane, `kv_bits` the bits per element of its blocks, as last noted.
    `occurrences` counts its tokens where penalties ask for it. `length_class` says by which frequencies its keys are
    rotated, in models where these depend on the length (`RopeConfig.length_class`).
    """

    request: "Request"
    index: int
    token_ids: list[int]
    chain: PrefixChain
    length_class: int = 0
    status: Status = Status.WAITING
    row: int | None = None
    num_published: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    kv_bytes: int = 0
    kv_peak_bytes: int = 0
    kv_spread: tuple[int, int] = (0, 0)
    kv_bits: float = 0.0
    eviction: "Eviction | None" = None
    encoding: "Encoding | None" = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    detokenizer: "IncrementalDetokenizer | None" = None
    processors: "list[LogitsProcessor]" = field(default_factory=list)
    occurrences: "Occurrences | None" = None

    def enter(self, length_class: int) -> None:
        """Change the frequencies of a sequence without blocks; it shares prefixes of that class alone."""
        self.length_class, self.chain, self.num_published = length_class, self.request.chain(length_class), 0

    def follow(self, other: "Sequence") -> None:
        """Continue from what `other` has computed: take its length class and its chain of blocks."""
        self.length_class, self.chain = other.length_class, PrefixChain(other.chain.salt, list(other.chain.digests))

    @property
    def kv_method(self) -> str:
        """Cache policy in its canonical spelling."""
        if self.eviction is not None:
            return str(self.eviction.policy.spec)
        return "full" if self.encoding is None else str(self.encoding)

    @property
    def output_token_ids(self) -> list[int]:
        """Tokens generated so far."""
        return self.token_ids[len(self.request.prompt_token_ids) :]

    @property
    def num_output_tokens(self) -> int:
        """Number of tokens generated so far."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def is_new(self) -> bool:
        """True while it starts for the first time: it was not preempted, and has generated nothing."""
        return self.num_preemptions == 0 and self.num_output_tokens == 0

    @property
    def finished(self) -> bool:
        """True once `finish_reason` is known."""
        return self.status is Status.FINISHED


class Request:
    """A prompt with its options; owns `params.n` sequences, of which the first computes the prompt for all.

    `forced_token_ids` makes the answer: every token goes through the decode path as if it had been sampled, and the
    request ends after the last one. `cache_salt` separates prefix caches, as does the `length_class` with which its
    sequences begin. Lower `priority` runs earlier.
    `error` says why a request ended for which no token could be chosen. `unused_prefix` tokens of the prompt were in
    the prefix index and not adopted, because its policy forbids it.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Seq[int],
        params: SamplingParams,
        *,
        arrival: int,
        seed: int,
        max_tokens: int,
        prompt: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        forced_token_ids: Seq[int] | None = None,
        length_class: int = 0,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = list(prompt_token_ids)
        self.params = params
        self.arrival = arrival
        self.seed = seed
        self.max_tokens = max_tokens
        self.priority = priority
        self.cache_salt = cache_salt
        self.length_class = length_class
        self.beams: BeamSearch | None = None
        self.error: RequestFailedError | None = None
        self.unused_prefix = 0
        self.processors: list[LogitsProcessor] = []
        self.forced_token_ids = None if forced_token_ids is None else list(forced_token_ids)
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = (
            None if params.prompt_logprobs is None else [None]
        )
        self.sequences = [self._sequence(0)]
        self.timing = Timing(time.monotonic())

    def _sequence(self, index: int) -> Sequence:
        length_class = self.length_class
        return Sequence(self, index, list(self.prompt_token_ids), self.chain(length_class), length_class)

    def chain(self, length_class: int) -> PrefixChain:
        """Return an empty chain for sequences of a length class."""
        return PrefixChain(f"{self.cache_salt}\0{length_class}" if length_class else self.cache_salt)

    def add_sequence(self) -> Sequence:
        """Append and return one more sequence, which starts where the prompt ends."""
        sequence = self._sequence(len(self.sequences))
        self.sequences.append(sequence)
        return sequence

    @property
    def forked(self) -> bool:
        """True once all `params.n` sequences exist."""
        return len(self.sequences) == self.params.n

    @property
    def finished(self) -> bool:
        """True once every sequence has ended (one that was aborted before it forked stays alone)."""
        return all(s.finished for s in self.sequences)

    @property
    def sort_key(self) -> tuple[int, int]:
        """Order of service: priority, then arrival."""
        return (self.priority, self.arrival)
