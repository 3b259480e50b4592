"""Engine: runs steps over all waiting and running requests."""

import time
from collections.abc import Sequence as Seq
from typing import Any

from kvloom.cache.kvcache import KVCache
from kvloom.engine.accounts import Accounts
from kvloom.engine.admission import Admission
from kvloom.engine.answers import Answers
from kvloom.engine.beam import BeamSearchParams
from kvloom.engine.beamsteps import BeamSteps
from kvloom.engine.continuation import Continuation
from kvloom.engine.encodings import Encodings
from kvloom.engine.evictions import Evictions
from kvloom.engine.kvpolicies import KVPolicies
from kvloom.engine.lengthclasses import LengthClasses
from kvloom.engine.logits_processors import ProcessorFactory
from kvloom.engine.output import KVUsage, RequestOutput
from kvloom.engine.params import SamplingParams
from kvloom.engine.request import Request
from kvloom.engine.runner import Runner
from kvloom.engine.sampler import Draw, Sampler
from kvloom.engine.scheduler import Scheduler
from kvloom.engine.stepfigures import StepFigures, Traffic
from kvloom.engine.tokenfacts import TokenFacts
from kvloom.engine.work import Work
from kvloom.errors import InvalidInputError
from kvloom.kernels.threads import one_torch_thread
from kvloom.models.tokenizer import Tokenizer
from kvloom.policies.allowlist import EVERYTHING, AllowList
from kvloom.spec.policy import FULL, PolicySpec, Term


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
        kv_policy: PolicySpec = FULL,
        allow_kv_policies: AllowList = EVERYTHING,
        kv_store: Term | None = None,
        max_position: int | None = None,
    ) -> None:
        """Take requests of up to `max_model_len` tokens; under a policy that evicts, of up to `max_position`.

        `kv_policy` is the policy of requests that name none; they may name those in `allow_kv_policies`. `kv_store` is
        the store of all whose policy has none.
        """
        self.runner = runner
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.sampler = Sampler(eos_token_ids)
        self.processors = ProcessorFactory(tokenizer, runner.model.config.vocab_size, eos_token_ids)
        self.answers = Answers(scheduler, runner.cache, tokenizer, eos_token_ids)
        self.beams = BeamSteps(scheduler.queues, eos_token_ids, self.answers.start_text)
        self.continuation = Continuation(self.sampler, self.beams, self.answers, scheduler.queues)
        self.accounts = Accounts(scheduler.queues)
        self.seed = seed
        facts = None if tokenizer is None else TokenFacts(tokenizer)
        self.policies = KVPolicies(
            runner,
            scheduler,
            own=kv_policy,
            allowed=allow_kv_policies,
            store=kv_store,
            token_kinds=None if facts is None else facts.kinds,
            replay_instruction=None if facts is None else facts.replay_instruction,
        )
        self.lengths = LengthClasses(runner.model.config, scheduler.queues)
        self.evictions = Evictions(runner, scheduler)
        self.encodings = Encodings(runner.cache.encoder, scheduler)
        self.admission = Admission(
            self.policies,
            self.processors,
            scheduler.capacity,
            vocab_size=runner.model.config.vocab_size,
            max_num_seqs=scheduler.max_num_seqs,
            max_model_len=max_model_len,
            max_position=max_model_len if max_position is None else max_position,
        )
        self.requests: dict[str, Request] = {}
        self.num_arrived = 0
        self.num_prompt_tokens = 0
        self.num_steps = 0
        self.step_seconds = 0.0
        self.last_step = StepFigures(0, 0, 0.0, None)

    @property
    def cache(self) -> KVCache:
        """The cache that all requests share."""
        return self.runner.cache

    @property
    def max_model_len(self) -> int:
        """Most tokens of a request, prompt and answer together."""
        return self.admission.max_model_len

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
        kv_policy: PolicySpec | None = None,
    ) -> Request:
        """Queue a request under `kv_policy`, None for the engine's own policy.

        Raises `InvalidInputError`, `UnsupportedError` or `DoesNotFitError`; the engine is then unchanged.
        """
        self.admission.check_options(request_id, cache_salt, priority)
        name = request_id if request_id is not None else f"request-{self.num_arrived}"
        if name in self.requests:
            raise InvalidInputError(f"request id {name!r} is in use; choose another or leave it out")
        max_tokens = self.check(prompt_token_ids, params, forced_token_ids, kv_policy)
        policy = self.policies.policy_for(kv_policy)
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
            length_class=self.lengths.at_start(len(prompt_token_ids), max_tokens, policy),
        )
        request.processors = self.processors.processors(params)
        self.policies.start(policy, request.sequences[0])
        self.scheduler.queues.enqueue(request.sequences[0])
        self.answers.start_text(request.sequences[0])
        self.num_arrived += 1
        self.num_prompt_tokens += len(request.prompt_token_ids)
        self.requests[name] = request
        return request

    def add_beam_search(
        self, prompt_token_ids: Seq[int], params: BeamSearchParams, *, prompt: str | None = None, **options: Any
    ) -> Request:
        """Queue a beam search; `options` are those of `add`. Under a policy each beam evicts separately.

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
        kv_policy: PolicySpec | None = None,
    ) -> int:
        """Return how many tokens such a request may generate; changes nothing and may be called from any thread.

        Raises `InvalidInputError` for wrong ids and lengths, `UnsupportedError` with every reason why the policy cannot
        run, and `DoesNotFitError` when the request could not run even alone.
        """
        return self.admission.check_request(prompt, params, forced, kv_policy)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now and free its blocks; returns its output so far, or None when there is no such request."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return None
        for sequence in request.sequences:
            if not sequence.finished:
                self.scheduler.queues.finish(sequence, "abort")
        return self.output(request)

    def step(self) -> list[Request]:
        """Run one iteration; returns the requests that got a token or failed, in the order of their work.

        Where the kernels compute the model, torch keeps to one thread.

        A request for which no token can be chosen, or whose cache method fails, ends with `finish_reason` "error" and
        its `error` set; the others continue. When the step itself fails, the requests of this step are aborted, their
        blocks are freed, and it raises.
        """
        with one_torch_thread(not self.runner.model.computes_in_torch):
            return self._step()

    def _step(self) -> list[Request]:
        started = time.perf_counter()
        self.lengths.update()
        scheduled = self.scheduler.schedule()
        if not scheduled:
            return []
        self._note_started(scheduled)
        try:
            forward = self.runner.forward(scheduled, logits=self.continuation.needs_logits(scheduled))
            draws = self.continuation.draw(scheduled, forward)
            work = self.answers.commit(scheduled, draws)
            self.runner.observe(work, forward)
            self.scheduler.prefixes.publish(work)
            traffic = Traffic(self.cache, work)
            failed = self.evictions.evict(work)
            self.encodings.encode(work)
            traffic.returned(self.cache)
            draws += self.continuation.branch(draws, forward)
            self.answers.settle(draws, failed)
        except BaseException:
            for item in scheduled:
                self.abort(item.sequence.request.request_id)
            raise
        self._count_step(scheduled, draws, time.perf_counter() - started, traffic)
        return self._progressed(draws, failed)

    def _note_started(self, work: list[Work]) -> None:
        now = time.monotonic()
        for item in work:
            if item.sequence.request.timing.started is None:
                item.sequence.request.timing.started = now

    def _count_step(self, work: list[Work], draws: list[Draw], seconds: float, traffic: Traffic) -> None:
        self.num_steps += 1
        self.last_step = StepFigures(sum(item.num_tokens for item in work), len(draws), seconds, traffic)
        self.step_seconds += seconds

    def _progressed(self, draws: list[Draw], failed: list[Request]) -> list[Request]:
        changed = list(dict.fromkeys([*(draw.sequence.request for draw in draws), *failed]))
        now = time.monotonic()
        for request in changed:
            if request.error is None:
                request.timing.first_token = request.timing.first_token or now
                request.timing.last_token = now
            if request.finished:
                del self.requests[request.request_id]
        return changed

    def output(self, request: Request) -> RequestOutput:
        """Return a snapshot of a request, complete or so far."""
        return self.accounts.output(request)

    def kv_usage(self, request: Request) -> KVUsage:
        """Return a request's present and peak usage of the cache, without a copy of its tokens."""
        return self.accounts.kv_usage(request)
