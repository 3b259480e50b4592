"""/v1/completions: prompts of text or token ids continued, with echo and exact log-probabilities."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from kvloom.engine.params import SamplingParams
from kvloom.server.answer import Delta, Update
from kvloom.server.bodies import COMPLETION
from kvloom.server.dialect import COMPLETIONS, event
from kvloom.server.exchange import Context, encode_large_json
from kvloom.server.fields import Body
from kvloom.server.job import respond_with
from kvloom.server.kvpolicy import read_kv_policy
from kvloom.server.logprobs import LogprobFormat
from kvloom.server.queue import Place
from kvloom.server.refusal import bad_field
from kvloom.server.service import Service, checked_text
from kvloom.server.ticket import Ticket
from kvloom.server.usage import Usage

PromptLogprobs = list[Any]


@dataclass
class Choice:
    """One answer as it is put together; `offset` is where its next token begins in the text."""

    place: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    offset: int = 0
    echoed: bool = False

    def add(self, delta: Delta) -> None:
        """Append `delta`; mutates self."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stop_reason = delta.stop_reason if delta.stop_reason is not None else self.stop_reason

    @property
    def mean_logprob(self) -> float:
        """Log-probability per token of the answer."""
        total: float = sum(entry[token].logprob for token, entry in zip(self.token_ids, self.logprobs, strict=True))
        return total / max(1, len(self.token_ids))


class CompletionJob:
    """One body of /v1/completions, from its fields to the choices of the answer."""

    dialect = COMPLETIONS

    def __init__(self, service: Service, context: Context, body: Body, place: Place) -> None:
        self.service = service
        self.place = place
        self.context = context
        self.body = body
        self.model = service.intake.check_model(body)
        self.created = int(time.time())
        self.n: int = body.get("n", 1)
        self.best_of: int = body.get("best_of", self.n)
        self.echo = bool(body.get("echo", False))
        self.logprobs: int | None = body.get("logprobs")
        self.stream = bool(body.get("stream", False))
        self.show_ids = bool(body.get("return_token_ids", False))
        self.drop_answer = False
        self.params = self._params()
        self.policy = read_kv_policy(body.get("kv_policy"))
        self.names = LogprobFormat(
            service.tokenizer,
            count=self.logprobs or 0,
            as_ids=bool(body.get("return_tokens_as_token_ids", False)),
            skip_special=self.params.skip_special_tokens,
        )

    def _params(self) -> SamplingParams:
        max_tokens = self.body.get("max_tokens", 16)
        if max_tokens == -1:
            max_tokens = None
        elif max_tokens == 0:
            if not self.echo:
                raise bad_field("max_tokens", "max_tokens is 0, which needs echo=true; ask for at least 1 token")
            self.drop_answer, max_tokens = True, 1
        if self.best_of < self.n:
            raise bad_field("best_of", f"best_of is {self.best_of}, below n, which is {self.n}")
        if self.best_of > self.n and self.stream:
            raise bad_field("best_of", "best_of above n cannot be streamed: which answers count is known at the end")
        hidden = 0 if self.best_of > self.n else None
        if self.echo and self.logprobs is not None and "prompt_logprobs" not in self.body:
            self.body.values["prompt_logprobs"] = self.logprobs
            self.own_prompt_logprobs = False
        else:
            self.own_prompt_logprobs = "prompt_logprobs" in self.body
        return self.service.intake.limits.params(
            self.body,
            n=self.best_of,
            max_tokens=max_tokens,
            logprobs=self.logprobs if self.logprobs is not None else hidden,
        )

    # ---- prompts --------------------------------------------------------------------------------------------------

    async def tickets(self) -> list[Ticket]:
        """Return one checked ticket a prompt; tokenisation runs in the pool."""
        prompts = self._prompts()
        limit = self.service.config.max_sequences_per_request
        if len(prompts) * self.best_of > limit:
            raise bad_field(
                "prompt", f"{len(prompts)} prompts with {self.best_of} answers each are more than {limit} at once"
            )
        self.place.widen(len(prompts))
        await self.service.prepare(self.params)
        encoded = await self.service.workers.offload(lambda: [self._encoded(prompt) for prompt in prompts])
        return self.service.intake.tickets(self.context, self.body, encoded, self.params, self.policy)

    def _prompts(self) -> list[str] | list[list[int]]:
        given = self.body.get("prompt")
        single = isinstance(given, str) or isinstance(given[0], int)
        prompts: list[Any] = [given] if single else given
        return prompts

    def _encoded(self, prompt: str | list[int]) -> tuple[list[int], str | None]:
        """Return (token ids, text or None) of one prompt, checked against the model; for a thread of the pool."""
        text: str | None = None
        if isinstance(prompt, str):
            text = checked_text(prompt)
            ids = self.service.tokenizer.encode(text, self.body.get("add_special_tokens", True))
        else:
            ids = list(prompt)
        ids = self.service.intake.truncated(ids, self.body, self.params)
        if not ids:
            raise bad_field("prompt", "the prompt is empty; give at least one token")
        self.service.intake.check_prompt(ids, self.params, self.policy)
        if self.echo and (text is None or "truncate_prompt_tokens" in self.body):
            text = self.service.tokenizer.decode(ids, self.params.skip_special_tokens)
        return ids, text

    # ---- answers --------------------------------------------------------------------------------------------------

    async def answer(self, tickets: list[Ticket]) -> bytes:
        """Run `tickets` to their ends and return the whole body in JSON."""
        usage = self.service.usage(tickets)
        choices = {(t.place, i): Choice(t.place) for t in tickets for i in range(self.best_of)}
        prompts: dict[int, PromptLogprobs] = {}
        feed = self.service.submit(tickets, self.place)
        try:
            async for updates in feed:
                for update in updates:
                    usage.count(update)
                    if update.prompt_logprobs is not None:
                        prompts[update.place] = update.prompt_logprobs
                    for index, delta in update.deltas.items():
                        choices[update.place, index].add(delta)
        finally:
            self.service.release(tickets)
        num_tokens = sum(len(choice.token_ids) for choice in choices.values()) + sum(map(len, prompts.values()))
        return await self.service.workers.build(lambda: self._whole(tickets, choices, prompts, usage), num_tokens)

    def _whole(
        self,
        tickets: list[Ticket],
        choices: dict[tuple[int, int], Choice],
        prompts: dict[int, PromptLogprobs],
        usage: Usage,
    ) -> bytes:
        """Return the body of an answer that has ended; for any thread."""
        shown: list[dict[str, Any]] = []
        for ticket in tickets:
            mine = [choices[ticket.place, index] for index in range(self.best_of)]
            if self.best_of > self.n:
                mine = sorted(mine, key=lambda choice: -choice.mean_logprob)[: self.n]
            for choice in mine:
                shown.append(self._choice(len(shown), choice, ticket, prompts.get(ticket.place)))
        self._note(usage, shown)
        return encode_large_json({**self._head("text_completion"), "choices": shown, "usage": usage.body()})

    def _note(self, usage: Usage, shown: list[dict[str, Any]]) -> None:
        if self.drop_answer:
            usage.completion_tokens = 0
        reasons = sorted({str(choice["finish_reason"]) for choice in shown})
        self.context.facts.update(
            prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens, finish_reasons=reasons
        )

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"cmpl-{self.context.answer_id}", "object": kind, "created": self.created, "model": self.model}

    def _choice(self, index: int, choice: Choice, ticket: Ticket, prompt: PromptLogprobs | None) -> dict[str, Any]:
        """Return what `choice` has gained as a choice of the answer; the prompt comes before the first of it."""
        text, tokens, entries = choice.text, choice.token_ids, choice.logprobs
        if self.drop_answer:
            text, tokens, entries = "", [], []
        show_prompt = not choice.echoed
        choice.echoed = True
        echoed = self.echo and show_prompt
        body: dict[str, Any] = {
            "index": index,
            "text": (ticket.prompt or "") + text if echoed else text,
            "logprobs": None,
            "finish_reason": "length" if self.drop_answer and choice.finish_reason else choice.finish_reason,
            "stop_reason": None if self.drop_answer else choice.stop_reason,
        }
        if self.logprobs is not None:
            all_tokens = [*ticket.prompt_token_ids, *tokens] if echoed else tokens
            all_entries = [*(prompt or []), *entries] if echoed else entries
            body["logprobs"], choice.offset = self.names.completion(all_tokens, all_entries, choice.offset)
        if self.own_prompt_logprobs and show_prompt:
            body["prompt_logprobs"] = self.names.prompt(prompt or [])
        if self.show_ids:
            body["token_ids"] = tokens
            body["prompt_token_ids"] = ticket.prompt_token_ids if show_prompt else None
        return body

    # ---- streaming ------------------------------------------------------------------------------------------------

    async def events(self, tickets: list[Ticket]) -> AsyncGenerator[bytes, None]:
        """Yield the answer event by event; closing the generator aborts what is left."""
        options = self.body.get("stream_options", {})
        with_usage = bool(options.get("include_usage", False))
        live_usage = bool(options.get("continuous_usage_stats", False))
        usage = self.service.usage(tickets)
        choices = {(t.place, i): Choice(t.place) for t in tickets for i in range(self.n)}
        head = self._head("text_completion")
        feed = self.service.submit(tickets, self.place)
        try:
            async for updates in feed:
                for update in updates:
                    usage.count(update)
                    extra = {"usage": usage.body() if live_usage else None} if with_usage else {}
                    write = partial(self._events, head, extra, update, choices, tickets[update.place])
                    new = sum(not choices[update.place, index].echoed for index in update.deltas)
                    num_tokens = update.num_tokens + new * len(update.prompt_logprobs or ())
                    for written in await self.service.workers.build(write, num_tokens):
                        yield written
        finally:
            self.service.release(tickets)
            self._note(usage, [{"finish_reason": c.finish_reason} for c in choices.values()])
        if with_usage:
            yield event({**head, "choices": [], "usage": usage.body()})

    def _events(
        self,
        head: dict[str, Any],
        extra: dict[str, Any],
        update: Update,
        choices: dict[tuple[int, int], Choice],
        ticket: Ticket,
    ) -> list[bytes]:
        """Return the events that tell of `update`, none or several; for any thread."""
        return [event({**head, "choices": [body], **extra}) for body in self._gained(update, choices, ticket)]

    def _gained(self, update: Update, choices: dict[tuple[int, int], Choice], ticket: Ticket) -> list[dict[str, Any]]:
        bodies = []
        for index, delta in update.deltas.items():
            choice = choices[update.place, index]
            choice.text, choice.token_ids, choice.logprobs = "", [], []
            choice.add(delta)
            nothing = not delta.text and delta.finish_reason is None and self.logprobs is None and not self.show_ids
            if nothing and (choice.echoed or not self.echo):
                continue
            bodies.append(self._choice(update.place * self.n + index, choice, ticket, update.prompt_logprobs))
        return bodies


async def respond(request: Request, service: Service) -> ASGIApp:
    """Answer POST /v1/completions."""
    return await respond_with(CompletionJob, COMPLETION, request, service)
