"""Engine: one step at a time over everything that waits or runs."""

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import torch

from kvloom.cache.kvcache import KVCache
from kvloom.engine.beam import BeamSearchParams
from kvloom.engine.beamsteps import BeamSteps
from kvloom.engine.detokenizer import IncrementalDetokenizer
from kvloom.engine.evictions import Evictions
from kvloom.engine.kvpolicies import KVPolicies
from kvloom.engine.logits_processors import ProcessorFactory
from kvloom.engine.output import KVUsage, RequestOutput, kv_usage_of, output_of
from kvloom.engine.params import SamplingParams
from kvloom.engine.request import Logprob, Request, Sequence, Status
from kvloom.engine.runner import Runner
from kvloom.engine.sampler import Sampler
from kvloom.engine.scheduler import Scheduler, Work
from kvloom.engine.stepfigures import StepFigures, Traffic
from kvloom.engine.tokenfacts import TokenFacts
from kvloom.errors import InvalidInputError
from kvloom.models.model import StepOutput
from kvloom.models.tokenizer import Tokenizer
from kvloom.policies.policy import Policy
from kvloom.spec.store import STORES

UNBOUNDED_TOKENS = 1 << 31
"""Room of a request whose positions are counted in the cache, so that no length of the model ends it."""

LogitsObserver = Callable[[list[Sequence], torch.Tensor], None]
"""Called before sampling with N sequences and their logits [N, V] float32, which it must not change."""


class Engine:
    """Requests in, tokens out. Not thread-safe: one thread calls `add`, `step` and `abort`; any may call `check`."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: Tokenizer | None,
        *,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
        seed: int = 0,
        kv_policy: str | None = None,
        allow_kv_policies: Seq[str] | None = None,
        max_position: int | None = None,
    ) -> None:
        """Take requests of up to `max_model_len` tokens; under a policy that forgets, of up to `max_position`.

        `kv_policy` is the policy of requests that name none; they may name those in `allow_kv_policies` (None: any).
        """
        self.runner = runner
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.sampler = Sampler(eos_token_ids)
        self.processors = ProcessorFactory(tokenizer, runner.model.config.vocab_size, eos_token_ids)
        self.beams = BeamSteps(scheduler, eos_token_ids, self._start_text)
        self.seed = seed
        self.observer: LogitsObserver | None = None
        self.max_position = max_model_len if max_position is None else max_position
        facts = None if tokenizer is None else TokenFacts(tokenizer)
        self.policies = KVPolicies(
            runner,
            scheduler,
            own=kv_policy,
            allowed=allow_kv_policies,
            token_kinds=None if facts is None else facts.kinds,
            replay_instruction=None if facts is None else facts.replay_instruction,
        )
        self.evictions = Evictions(runner, scheduler)
        self.requests: dict[str, Request] = {}
        self.num_arrived = 0
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.num_steps = 0
        self.step_seconds = 0.0
        self.last_step = StepFigures(0, 0, 0.0, None)

    @property
    def cache(self) -> KVCache:
        """The cache that all requests share."""
        return self.runner.cache

    @property
    def num_evicted_tokens(self) -> int:
        """Tokens that policies have dropped, summed over lanes."""
        return self.evictions.evicted_tokens

    @property
    def has_work(self) -> bool:
        """True while any request waits or runs."""
        return self.scheduler.has_work

    def add(
        self,
        prompt_token_ids: Seq[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        prompt: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        forced_token_ids: Seq[int] | None = None,
        kv_policy: str | None = None,
    ) -> Request:
        """Queue a request; `kv_policy` is a policy string, None for the engine's own policy.

        Raises `InvalidInputError`, `UnsupportedError` or `DoesNotFitError`, and then leaves nothing behind.
        """
        for option, value, kind in (
            ("request_id", "" if request_id is None else request_id, str),
            ("cache_salt", cache_salt, str),
            ("priority", priority, int),
        ):
            if not isinstance(value, kind) or isinstance(value, bool):
                raise InvalidInputError(f"{option} must be {kind.__name__}, not {value!r}")
        name = request_id if request_id is not None else f"request-{self.num_arrived}"
        if name in self.requests:
            raise InvalidInputError(f"request id {name!r} is in use; choose another or leave it out")
        max_tokens = self.check(prompt_token_ids, params, forced_token_ids, kv_policy)
        request = Request(
            name,
            prompt_token_ids,
            params,
            arrival=self.num_arrived,
            seed=params.seed if params.seed is not None else (self.seed << 32) + self.num_arrived,
            max_tokens=max_tokens,
            prompt=prompt,
            priority=priority,
            cache_salt=cache_salt,
            forced_token_ids=forced_token_ids,
            length_class=self.runner.model.config.length_class(len(prompt_token_ids) + max_tokens),
        )
        request.processors = self.processors.processors(params)
        self.policies.start(self.policies.policy_of(kv_policy), request.sequences[0])
        self.scheduler.add(request)
        self._start_text(request.sequences[0])
        self.num_arrived += 1
        self.num_prompt_tokens += len(request.prompt_token_ids)
        self.requests[name] = request
        return request

    def add_beam_search(
        self, prompt_token_ids: Seq[int], params: BeamSearchParams, *, prompt: str | None = None, **options: Any
    ) -> Request:
        """Queue a beam search; `options` are those of `add`. Under a policy each beam forgets for itself.

        The request's sequences are its beams, until it is finished and they are the best `params.n`, best first.
        Raises as `add` does.
        """
        if options.get("forced_token_ids") is not None:
            raise InvalidInputError("a beam search chooses its tokens; leave out forced_token_ids")
        request = self.add(prompt_token_ids, BeamSteps.sampling_params(params), prompt=prompt, **options)
        self.beams.start(request, params)
        return request

    def check(
        self,
        prompt: Seq[int],
        params: SamplingParams,
        forced: Seq[int] | None = None,
        kv_policy: str | None = None,
    ) -> int:
        """Return how many tokens such a request may generate; changes nothing and may be called from any thread.

        Raises `InvalidInputError` for wrong ids and lengths, `UnsupportedError` with every reason why the policy cannot
        run, and `DoesNotFitError` when the request could not run even alone.
        """
        policy = self.policies.policy_of(kv_policy)
        max_tokens = self._max_tokens(prompt, params, forced, policy)
        self.processors.processors(params)
        if params.n > self.scheduler.max_num_seqs:
            raise InvalidInputError(f"n is {params.n}, above max_num_seqs, which is {self.scheduler.max_num_seqs}")
        if policy is None:
            self.scheduler.check_fits(len(prompt) + max_tokens, "the request")
        else:
            self.policies.check_policy(policy, prompt, len(prompt) + max_tokens, params.n)
        return max_tokens

    def _max_tokens(
        self, prompt: Seq[int], params: SamplingParams, forced: Seq[int] | None, policy: Policy | None
    ) -> int:
        vocab = self.runner.model.config.vocab_size
        if not len(prompt):
            raise InvalidInputError("the prompt is empty; give at least one token")
        for token in (*prompt, *(forced or ()), *params.logit_bias, *params.stop_token_ids):
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
                raise InvalidInputError(f"{token!r} is not a token id; this model has ids 0 to {vocab - 1}")
        longest = self.max_model_len if policy is None else self.max_position
        room = longest - len(prompt)
        if policy is not None and policy.cache_positions:
            room = UNBOUNDED_TOKENS  # positions are counted in the cache: text has no end
        if room < 1:
            raise InvalidInputError(
                f"the prompt has {len(prompt)} tokens; the model's length is {longest} and at least one "
                "token is generated. Shorten the prompt or raise --max-model-len"
            )
        if forced is not None:
            if not 0 < len(forced) <= room or params.n != 1:
                raise InvalidInputError(f"a forced continuation has 1 to {room} tokens here and n=1")
            return len(forced)
        if params.max_tokens is None and room == UNBOUNDED_TOKENS:
            raise InvalidInputError("a request with positions=cache has no end of its own; give max_tokens")
        return room if params.max_tokens is None else min(params.max_tokens, room)

    def _start_text(self, sequence: Sequence) -> None:
        params = sequence.request.params
        if self.tokenizer is not None and params.detokenize:
            sequence.detokenizer = IncrementalDetokenizer(
                self.tokenizer,
                sequence.request.prompt_token_ids,
                stop=params.stop,
                skip_special_tokens=params.skip_special_tokens,
                include_stop_str_in_output=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
            )

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now and free its blocks; returns what it had, or None when there is no such request."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return None
        for sequence in request.sequences:
            if not sequence.finished:
                self.scheduler.finish(sequence, "abort")
        return self.output(request)

    def step(self) -> list[Request]:
        """Run one iteration; returns the requests that got a token, in the order of their work.

        When it fails, the requests of this step are aborted, their blocks are free, and it raises.
        """
        started = time.perf_counter()
        work = self.scheduler.schedule()
        if not work:
            return []
        self._note_started(work)
        try:
            output = self.runner.run(work, logits=self._needs_logits(work))
            self.runner.prompt_logprobs(work, output.hidden)
            self.scheduler.publish(work)
            traffic = Traffic(self.cache, work)
            self.evictions.evict(work)
            traffic.returned(self.cache)
            sequences, greedy, logits = self._sampling_rows(work, output)
            self._grow(sequences, greedy, logits)
        except BaseException:
            for item in work:
                self.abort(item.sequence.request.request_id)
            raise
        self.num_steps += 1
        tokens_run = sum(item.num_tokens for item in work)
        self.last_step = StepFigures(tokens_run, len(sequences), time.perf_counter() - started, traffic)
        self.step_seconds += self.last_step.seconds
        return self._progressed(sequences)

    def _note_started(self, work: list[Work]) -> None:
        now = time.monotonic()
        for item in work:
            if item.sequence.request.timing.started is None:
                item.sequence.request.timing.started = now

    def _needs_logits(self, work: list[Work]) -> bool:
        if self.observer is not None:
            return True
        return any(item.samples and self.sampler.needs_logits(item.sequence) for item in work)

    def _sampling_rows(
        self, work: list[Work], output: StepOutput
    ) -> tuple[list[Sequence], list[int], torch.Tensor | None]:
        """Return the N sequences that get a token, their best tokens [N] and logits [N, V] if they were computed.

        Forks requests whose prompt is done.
        """
        sequences: list[Sequence] = []
        rows: list[int] = []
        for row, item in enumerate(w for w in work if w.samples):
            if item.sequence.row is None:
                continue  # preempted by an eviction of this step: it will be computed again
            sequences.append(item.sequence)
            rows.append(row)
            if not item.sequence.request.forked:
                for child in self.scheduler.fork(item.sequence.request):
                    self._start_text(child)
                    sequences.append(child)
                    rows.append(row)
        logits = output.logits
        if logits is not None and len(rows) != len(logits):
            logits = logits[rows]
        if self.observer is not None and sequences:
            assert logits is not None
            self.observer(sequences, logits)
        return sequences, [output.greedy[row] for row in rows], logits

    def _grow(self, sequences: list[Sequence], greedy: list[int], logits: torch.Tensor | None) -> None:
        """Give each of N sequences its next token, and beams their next beams."""
        beams = [row for row, sequence in enumerate(sequences) if sequence.request.beams is not None]
        if beams:
            assert logits is not None
            self.num_generated_tokens += self.beams.run([sequences[row] for row in beams], logits[beams])
            rest = [row for row, sequence in enumerate(sequences) if sequence.request.beams is None]
            sequences, greedy, logits = [sequences[row] for row in rest], [greedy[row] for row in rest], logits[rest]
        tokens, logprobs = self.sampler.sample(greedy, logits, sequences)
        for sequence, token, logprob in zip(sequences, tokens, logprobs, strict=True):
            self._append(sequence, token, logprob)

    def _append(self, sequence: Sequence, token: int, logprob: dict[int, Logprob] | None) -> None:
        """Add a token to a sequence and end it if it should end."""
        sequence.token_ids.append(token)
        self.num_generated_tokens += 1
        if logprob is not None:
            sequence.logprobs.append(logprob)
            sequence.cumulative_logprob += logprob[token].logprob
        end = self._ending(sequence, token)
        if end is not None:
            if sequence.detokenizer is not None:
                sequence.detokenizer.finish()
            self.scheduler.finish(sequence, *end)

    def _ending(self, sequence: Sequence, token: int) -> tuple[str, int | str | None] | None:
        """Return (finish reason, stop reason) when `token` ends the sequence."""
        params, request = sequence.request.params, sequence.request
        count = sequence.num_output_tokens
        stops = request.forced_token_ids is None and count > params.min_tokens - 1
        ends = stops and (token in params.stop_token_ids or (not params.ignore_eos and token in self.eos_token_ids))
        if sequence.detokenizer is not None and (not ends or params.include_stop_str_in_output):
            sequence.detokenizer.append(token)
            if sequence.detokenizer.stop_hit is not None:
                return "stop", sequence.detokenizer.stop_hit
        if ends:
            return "stop", token if token in params.stop_token_ids else None
        return ("length", None) if count >= request.max_tokens else None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self.sampler.eos_token_ids

    def _progressed(self, sequences: list[Sequence]) -> list[Request]:
        changed = list(dict.fromkeys(s.request for s in sequences))
        now = time.monotonic()
        for request in changed:
            request.timing.first_token = request.timing.first_token or now
            request.timing.last_token = now
            if request.finished:
                del self.requests[request.request_id]
        return changed

    def output(self, request: Request) -> RequestOutput:
        """Return a snapshot of a request, complete or so far."""
        self._note_bytes(request)
        return output_of(request, self._bits)

    def kv_usage(self, request: Request) -> KVUsage:
        """Return what a request holds of the cache, and held at most, without a copy of its tokens."""
        self._note_bytes(request)
        return kv_usage_of(request, self._bits)

    @property
    def _bits(self) -> float:
        return float(STORES.get(self.cache.spec.store).bits)

    def _note_bytes(self, request: Request) -> None:
        for sequence in request.sequences:
            if sequence.status is Status.RUNNING:
                self.scheduler.note_bytes(sequence)
