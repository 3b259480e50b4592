"""RequestOutput: the answers to a request, with the figures of its KV cache."""

from dataclasses import asdict, dataclass, field
from typing import Any

from kvloom.engine.request import Logprob, Request, Sequence


@dataclass(frozen=True)
class CompletionOutput:
    """One answer so far: its text and tokens, and why it ended (`stop`, `length`, `abort`, `error`) if it did."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    cumulative_logprob: float | None
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass(frozen=True)
class KVUsage:
    """KV cache of one request, read off the lane table.

    `bytes_now` and `bytes_peak` count whole blocks of all its sequences, shared ones once for each sequence;
    `cached_tokens` of the prompt came from the prefix index; `evicted_tokens` sums over lanes what a policy dropped.
    `bits_per_element` are those of the blocks as they are stored, scales included, mean of its sequences. `method` is
    the policy in its canonical spelling, `note` says what it did to the use of cached prefixes.
    """

    bytes_now: int
    bytes_peak: int
    cached_tokens: int
    evicted_tokens: int
    preemptions: int
    bits_per_element: float
    method: str = "full"
    shortest_lane: int = 0
    longest_lane: int = 0
    note: str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A request and its answers, complete or so far; `metrics` holds the clock readings of `Timing` that there are.

    `error` says why a request ended for which no token could be chosen.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    kv: KVUsage
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens whose K and V came from the prefix index."""
        return self.kv.cached_tokens

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists and numbers, ready for JSON."""
        return asdict(self)


def completion_of(sequence: Sequence) -> CompletionOutput:
    """Return a snapshot of one sequence."""
    wanted = sequence.request.params.logprobs is not None
    return CompletionOutput(
        index=sequence.index,
        text=sequence.detokenizer.text if sequence.detokenizer else "",
        token_ids=sequence.output_token_ids,
        logprobs=list(sequence.logprobs) if wanted else None,
        cumulative_logprob=sequence.cumulative_logprob if wanted or sequence.request.beams is not None else None,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
    )


def kv_usage_of(request: Request) -> KVUsage:
    """Return the KV cache usage of `request`, as last recorded by the scheduler."""
    sequences = request.sequences
    return KVUsage(
        bytes_now=sum(s.kv_bytes for s in sequences),
        bytes_peak=sum(s.kv_peak_bytes for s in sequences),
        cached_tokens=sequences[0].num_cached_tokens,
        evicted_tokens=sum(s.eviction.evicted_tokens for s in sequences if s.eviction is not None),
        preemptions=sum(s.num_preemptions for s in sequences),
        bits_per_element=sum(s.kv_bits for s in sequences) / len(sequences),
        method=sequences[0].kv_method,
        shortest_lane=min(s.kv_spread[0] for s in sequences),
        longest_lane=max(s.kv_spread[1] for s in sequences),
        note=_note(request),
    )


def output_of(request: Request) -> RequestOutput:
    """Return a snapshot of `request`."""
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        outputs=[completion_of(s) for s in request.sequences],
        finished=request.finished,
        kv=kv_usage_of(request),
        prompt_logprobs=request.prompt_logprobs,
        metrics={name: value for name, value in asdict(request.timing).items() if value is not None},
        error=None if request.error is None else str(request.error),
    )


def _note(request: Request) -> str | None:
    """Return why the prefix cache was not used as far as it could be, or was used with a loss; None for neither."""
    eviction, encoding = request.sequences[0].eviction, request.sequences[0].encoding
    if encoding is not None and encoding.cached_tokens:
        return f"the {encoding.cached_tokens} tokens from the prefix cache were in {encoding.store.name}"
    if eviction is None or not request.unused_prefix:
        return None
    name, usable = eviction.policy.spec.selector.name, eviction.schedule.usable_prefix
    left = f"{request.unused_prefix} tokens in the prefix cache were not used: {name}"
    if eviction.policy.needs.watches_queries:
        return f"{left} needs queries that a cached prefix does not have; at most {usable} tokens may come from one"
    return f"{left} evicts in the middle of the prompt; at most {usable} tokens may come from a cached prefix"
