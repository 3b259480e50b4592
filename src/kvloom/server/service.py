"""Service: one model behind the API: admission, tokenisation outside the event loop, calls to the engine's thread."""

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request

from kvloom.engine.engine import Engine
from kvloom.engine.llm import LLM
from kvloom.engine.params import SamplingParams
from kvloom.errors import InvalidInputError, KvloomError
from kvloom.models.tokenizer import Tokenizer
from kvloom.registry import nearest
from kvloom.server.exchange import Context, parse_json, read_bytes
from kvloom.server.feed import Feed
from kvloom.server.fields import Body, Field, read_body
from kvloom.server.metrics import ServerMetrics
from kvloom.server.queue import Place, Queue
from kvloom.server.refusal import Refusal, bad_field
from kvloom.server.sampling import SamplingLimits
from kvloom.server.servingthread import ServingThread
from kvloom.server.settings import ServerConfig
from kvloom.server.ticket import Ticket
from kvloom.server.usage import Usage
from kvloom.server.watchdog import Watchdog
from kvloom.spec.policy import PolicySpec
from kvloom.spec.store import STORES

T = TypeVar("T")

NUM_TOKENIZER_THREADS = 2
LARGE_BODY_BYTES = 1 << 15
LARGE_ANSWER_TOKENS = 128
"""Tokens whose log-probabilities take some 2 ms to be written."""


class Service:
    """The shared state of all routes. Its methods run on the event loop unless they say otherwise."""

    def __init__(self, llm: LLM, config: ServerConfig) -> None:
        self.llm = llm
        self.config = config
        self.engine: Engine = llm.engine
        self.tokenizer: Tokenizer = llm.tokenizer
        self.names = config.served_model_name or (llm.model,)
        self.created = int(time.time())
        self.limits = SamplingLimits(config.max_logprobs, config.generation_defaults)
        spec = self.engine.cache.spec
        cache_config = {
            "block_size": str(spec.block_size),
            "cache_dtype": spec.store,
            "enable_prefix_caching": str(self.engine.scheduler.prefixes.enabled),
            "kv_cache_memory_bytes": str(self.engine.cache.arena.num_bytes),
            "max_model_len": str(self.engine.max_model_len),
        }
        self.metrics = ServerMetrics(self.names[0], cache_config)
        self.thread = ServingThread(self.engine, self.metrics)
        self.dog = Watchdog(config.client_timeout)
        self.draining = False
        self.num_open = 0  # HTTP requests that are being answered
        self.queue = Queue(config.max_num_queued_reqs)
        self._live: set[Ticket] = set()
        self._pool = ThreadPoolExecutor(NUM_TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        self._forms = ThreadPoolExecutor(1, thread_name_prefix="forms")

    def start(self) -> None:
        """Start the engine's thread; updates are delivered on the running loop."""
        loop = asyncio.get_running_loop()
        self.thread.start(loop)
        self._walk = loop.create_task(self.dog.run())

    def stop_watching(self) -> None:
        """End the watchdog; on the loop."""
        self._walk.cancel()

    def close(self) -> None:
        """Stop the engine's thread and abort running requests; for any thread, once the loop no longer uses it."""
        self.thread.stop()
        for pool in (self._pool, self._forms):
            pool.shutdown(wait=False, cancel_futures=True)

    # ---- before a request runs ------------------------------------------------------------------------------------

    def check_model(self, body: Body) -> str:
        """Return the served name that the body asks for; raises `Refusal` 404 naming the nearest one."""
        name: str = body.get("model", self.names[0])
        if name not in self.names:
            hint = nearest(name, list(self.names))
            known = ", ".join(self.names)
            raise Refusal(404, f"no model {name!r} here{hint}; served: {known}", param="model", code="model_not_found")
        return name

    def check_open(self) -> None:
        """Raise `Refusal` 503 when the server ends or the engine is dead."""
        if self.draining:
            raise Refusal(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})
        if not self.thread.alive:
            raise Refusal(503, "the engine has stopped after an error; restart the server", code="engine_dead")

    @property
    def num_live(self) -> int:
        """Prompts that are accepted and not finished."""
        return len(self._live)

    def read_priority(self, body: Body) -> int:
        """Return the priority; raises `Refusal` where it would be ignored."""
        priority: int = body.get("priority", 0)
        if priority and self.config.scheduling_policy != "priority":
            raise bad_field("priority", "priority is not used here; start the server with --scheduling-policy priority")
        return priority

    def read_salt(self, body: Body, context: Context) -> str:
        """Return the salt of the prefix cache: the body's, behind the caller's key where keys are kept apart."""
        salt: str = body.get("cache_salt", "")
        return f"{context.key_digest}:{salt}" if self.config.isolate_by_key else salt

    def check_prompt(self, ids: Sequence[int], params: SamplingParams, policy: PolicySpec | None) -> int:
        """Return the most tokens that can be generated, under `policy` (None: the engine's own). For any thread.

        Raises `Refusal` `context_length_exceeded`, and the engine's own errors for what can never run.
        """
        try:
            forgets = self.engine.policies.policy_of(policy) is not None
        except KvloomError as error:
            raise bad_field("kv_policy", str(error), "unsupported") from None
        longest = self.engine.max_position if forgets else self.engine.max_model_len
        if len(ids) >= longest and not forgets:
            raise _too_long(len(ids), longest)  # before every single id is checked
        try:
            return self.engine.check(ids, params, None, policy)
        except InvalidInputError as error:
            if len(ids) < longest:
                raise
            raise _too_long(len(ids), longest) from error

    def truncated(self, ids: list[int], body: Body, params: SamplingParams) -> list[int]:
        """Return the end of the prompt that `truncate_prompt_tokens` asks for."""
        keep = body.get("truncate_prompt_tokens")
        if keep is None:
            return ids
        if keep == 0:
            raise bad_field("truncate_prompt_tokens", "truncate_prompt_tokens is 0; keep at least 1 token")
        if keep == -1:
            keep = max(1, self.engine.max_model_len - (params.max_tokens or 1))
        return ids[-keep:]

    async def receive_body(self, request: Request) -> bytes:
        """Return the raw body; raises `Refusal` for a forbidden body, or one that is sent too slowly."""
        return await read_bytes(request, self.config.max_body_bytes, self.dog)

    async def read_body(self, raw: bytes, table: Mapping[str, Field]) -> Body:
        """Return the checked fields of a body; a large one is checked in a thread of the pool."""
        if len(raw) <= LARGE_BODY_BYTES:
            return read_body(parse_json(raw), table)
        return await self.offload(lambda: read_body(parse_json(raw), table))

    async def offload(self, function: Callable[[], T]) -> T:
        """Run `function` (tokenisation, a chat template) in a thread of the pool."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    async def build(self, function: Callable[[], T], num_tokens: int) -> T:
        """Return `function()`, which writes about `num_tokens` tokens; many are written in a thread of the pool."""
        return function() if num_tokens <= LARGE_ANSWER_TOKENS else await self.offload(function)

    async def prepare(self, params: SamplingParams) -> None:
        """Compile the form of the answers, if they have one, in a thread of its own: a large one takes seconds.

        Raises the engine's errors for an invalid form; later checks of `params` use the compiled one.
        """
        if params.structured_outputs is not None:
            await self.compiling(lambda: self.engine.processors.processors(params))

    async def compiling(self, function: Callable[[], T]) -> T:
        """Run `function`, which compiles forms, in the thread for that."""
        return await asyncio.get_running_loop().run_in_executor(self._forms, function)

    # ---- a request runs -------------------------------------------------------------------------------------------

    def tickets(
        self,
        context: Context,
        body: Body,
        prompts: Sequence[tuple[list[int], str | None]],
        params: SamplingParams,
        policy: PolicySpec | None,
    ) -> list[Ticket]:
        """Return one ticket a prompt, all under `policy` (None: the engine's own) and with the same feed."""
        stream = bool(body.get("stream", False))
        live = stream and bool(body.get("stream_options", {}).get("continuous_usage_stats", False))
        feed = Feed(len(prompts))
        salt, priority, unique = self.read_salt(body, context), self.read_priority(body), secrets.token_hex(4)
        return [
            Ticket(
                f"{context.request_id}-{place}-{unique}",
                ids,
                params,
                feed,
                place=place,
                prompt=text,
                priority=priority,
                cache_salt=salt,
                kv_policy=policy,
                streaming=stream,
                live_usage=live,
                arrived=context.started,
            )
            for place, (ids, text) in enumerate(prompts)
        ]

    def submit(self, tickets: Sequence[Ticket], place: Place) -> Feed:
        """Hand `tickets` to the engine, for which they wait in `place`, and return their feed; see `release`."""
        self.check_open()
        self.thread.submit(tickets)
        self._live.update(tickets)
        self.queue.join(tickets, place)
        return tickets[0].feed

    def release(self, tickets: Sequence[Ticket]) -> None:
        """Remove `tickets`, aborting those that have not ended; call it once for each `submit`."""
        self._live.difference_update(tickets)
        aborted = bool(tickets and tickets[0].feed.num_open)
        self.queue.leave(tickets, ended=not aborted)
        if aborted:
            self.thread.abort(tickets)

    def cancel_all(self) -> None:
        """Fail everything that runs, because the server ends."""
        self.thread.fail_all(
            Refusal(503, "the server is shutting down and did not finish this answer", code="shutting_down")
        )

    def usage(self, tickets: Sequence[Ticket]) -> Usage:
        """Return an account with the prompts of `tickets` in it."""
        spec = self.engine.cache.spec
        native = float(STORES.get(spec.store).bits)
        return Usage(sum(len(t.prompt_token_ids) for t in tickets), native, 8.0 * spec.bytes_per_token)

    async def between_steps(self, function: Callable[[Engine], Any]) -> Any:
        """Run `function` in the engine's thread between two steps and return its result."""
        return await asyncio.wrap_future(self.thread.call(function))


def _too_long(length: int, longest: int) -> Refusal:
    return Refusal(
        400,
        f"This model's maximum context length is {longest} tokens. However, your prompt has {length} tokens, and at "
        "least one is generated. Shorten the prompt, send truncate_prompt_tokens, or raise --max-model-len "
        "(context_length_exceeded)",
        param="prompt",
        code="context_length_exceeded",
    )


def checked_text(text: str) -> str:
    """Return `text`; raises `InvalidInputError` for half a surrogate pair, which no encoding can carry."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"the text has half a surrogate pair at character {error.start}") from None
    return text
