"""/v1/chat/completions: conversations through the model's chat template, with tools where it has them."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from kvloom.engine.params import SamplingParams
from kvloom.engine.structured_params import StructuredOutputsParams
from kvloom.server.answer import Delta, Update
from kvloom.server.conversation import conversation_ids, note_unused
from kvloom.server.eventstream import COMPLETIONS, event
from kvloom.server.exchange import Context, encode_large_json
from kvloom.server.fields import CHAT, Body
from kvloom.server.job import respond_with
from kvloom.server.logprobs import LogprobFormat
from kvloom.server.queue import Place
from kvloom.server.refusal import bad_field
from kvloom.server.service import Service
from kvloom.server.ticket import Ticket
from kvloom.server.toolcalls import BEGIN, ToolCallReader
from kvloom.server.tools import offered_tools
from kvloom.server.usage import Usage


@dataclass
class Message:
    """One answer as it is put together."""

    reader: ToolCallReader | None
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)  # pieces of them
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    begun: bool = False

    def take(self, delta: Delta) -> None:
        """Hold what `delta` alone brings, as content and calls; mutates self."""
        self.token_ids, self.logprobs = delta.token_ids, delta.logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        if self.reader is None:
            self.content, self.calls = delta.text, []
            return
        self.content, self.calls = self.reader.read(delta.text, delta.finish_reason is not None)
        if self.finish_reason == "stop" and self.reader.calls:
            self.finish_reason = "tool_calls"


class ChatJob:
    """One body of /v1/chat/completions, from its fields to the choices of the answer."""

    dialect = COMPLETIONS

    def __init__(self, service: Service, context: Context, body: Body, place: Place) -> None:
        self.service = service
        self.place = place
        self.context = context
        self.body = body
        self.model = service.check_model(body)
        self.created = int(time.time())
        self.n: int = body.get("n", 1)
        self.stream = bool(body.get("stream", False))
        self.show_ids = bool(body.get("return_token_ids", False))
        self.tools = offered_tools(body, service.tokenizer.chat_template)
        note_unused(body, service.tokenizer.chat_template)
        self.logprobs = self._num_logprobs()
        self.params = self._params()
        self.names = LogprobFormat(
            service.tokenizer,
            count=self.logprobs or 0,
            as_ids=bool(body.get("return_tokens_as_token_ids", False)),
            skip_special=self.params.skip_special_tokens,
        )

    def _num_logprobs(self) -> int | None:
        wanted = bool(self.body.get("logprobs", False))
        if "top_logprobs" in self.body and not wanted and self.body.get("top_logprobs"):
            raise bad_field("top_logprobs", "top_logprobs needs logprobs=true")
        return int(self.body.get("top_logprobs", 0)) if wanted else None

    def _params(self) -> SamplingParams:
        max_tokens = self.body.get("max_completion_tokens", self.body.get("max_tokens"))
        if max_tokens == 0:
            raise bad_field("max_tokens", "max_tokens is 0; ask for at least 1 token")
        max_tokens = None if max_tokens == -1 else max_tokens
        params = self.service.limits.params(self.body, n=self.n, max_tokens=max_tokens, logprobs=self.logprobs)
        if self.tools is not None and params.structured_outputs is not None:
            raise bad_field("tools", "an answer of a given form holds no calls; send tool_choice 'none' or ask no form")
        return params

    # ---- the prompt -----------------------------------------------------------------------------------------------

    async def tickets(self) -> list[Ticket]:
        """Return the checked ticket of the conversation; template and tokenisation run in the pool."""
        if self.tools is not None and self.tools.bound:
            form = await self.service.compiling(self._form_of_calls)
            self.params = replace(self.params, structured_outputs=form)
        await self.service.prepare(self.params)
        ids = await self.service.offload(self._encoded)
        return self.service.tickets(self.context, self.body, [(ids, None)], self.params)

    def _encoded(self) -> list[int]:
        """Return the conversation's token ids, checked against the model; for a thread of the pool."""
        offered = None if self.tools is None else self.tools.offered
        ids = conversation_ids(self.service, self.body, offered)
        if self.tools is not None and self.tools.forced:  # the answer begins inside a call
            ids += self.service.tokenizer.encode(f"{BEGIN}\n", add_special_tokens=False)
        ids = self.service.truncated(ids, self.body, self.params)
        if not ids:
            raise bad_field("messages", "the conversation comes to no token at all")
        self.service.check_prompt(ids, self.params, self.body)
        return ids

    def _form_of_calls(self) -> StructuredOutputsParams:
        """Return the form of forced or strict calls; for a thread that compiles."""
        assert self.tools is not None
        engine = self.service.engine
        return self.tools.form(
            lambda form: engine.processors.processors(SamplingParams(structured_outputs=form)), self.body.warnings
        )

    # ---- the answer -----------------------------------------------------------------------------------------------

    def _message(self) -> Message:
        only_first = self.body.get("parallel_tool_calls") is False
        return Message(None if self.tools is None else ToolCallReader(only_first, inside=self.tools.forced))

    def _head(self, kind: str) -> dict[str, Any]:
        name = f"chatcmpl-{self.context.answer_id}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model}

    def _note(self, usage: Usage, reasons: set[str]) -> None:
        self.context.facts.update(
            prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens, finish_reasons=sorted(reasons)
        )

    async def answer(self, tickets: list[Ticket]) -> bytes:
        """Run the conversation to its end and return the whole body in JSON."""
        (ticket,) = tickets
        usage = self.service.usage(tickets)
        whole = [Delta() for _ in range(self.n)]
        prompt = None
        feed = self.service.submit(tickets, self.place)
        try:
            async for updates in feed:
                for update in updates:
                    usage.count(update)
                    prompt = update.prompt_logprobs or prompt
                    for index, delta in update.deltas.items():
                        whole[index].add(delta)
        finally:
            self.service.release(tickets)
        num_tokens = sum(len(delta.token_ids) for delta in whole) + len(prompt or ())
        return await self.service.build(lambda: self._whole(ticket, whole, prompt, usage), num_tokens)

    def _whole(self, ticket: Ticket, whole: list[Delta], prompt: list[Any] | None, usage: Usage) -> bytes:
        """Return the body of an answer that has ended; for any thread."""
        choices = []
        for index, delta in enumerate(whole):
            message = self._message()
            message.take(delta)
            choices.append(self._choice(index, message))
        self._note(usage, {str(choice["finish_reason"]) for choice in choices})
        extra: dict[str, Any] = {}
        if prompt is not None:
            extra["prompt_logprobs"] = self.names.prompt(prompt)
        if self.show_ids:
            extra["prompt_token_ids"] = ticket.prompt_token_ids
        return encode_large_json({**self._head("chat.completion"), "choices": choices, "usage": usage.body(), **extra})

    def _choice(self, index: int, message: Message) -> dict[str, Any]:
        said: dict[str, Any] = {"role": "assistant", "content": message.content, "refusal": None}
        if message.reader is not None and message.reader.calls:
            said["content"] = message.content or None
            said["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in message.reader.calls]
        return {"index": index, "message": said, **self._ending(message)}

    def _ending(self, message: Message) -> dict[str, Any]:
        shown = None if self.logprobs is None else self.names.chat(message.token_ids, message.logprobs)
        body = {"logprobs": shown, "finish_reason": message.finish_reason, "stop_reason": message.stop_reason}
        return {**body, "token_ids": message.token_ids} if self.show_ids else body

    # ---- streaming ------------------------------------------------------------------------------------------------

    async def events(self, tickets: list[Ticket]) -> AsyncGenerator[bytes, None]:
        """Yield the answer event by event; closing the generator aborts what is left."""
        options = self.body.get("stream_options", {})
        with_usage = bool(options.get("include_usage", False))
        live_usage = bool(options.get("continuous_usage_stats", False))
        usage = self.service.usage(tickets)
        messages = [self._message() for _ in range(self.n)]
        head = self._head("chat.completion.chunk")
        feed = self.service.submit(tickets, self.place)
        reasons: set[str] = set()
        try:
            async for updates in feed:
                for update in updates:
                    usage.count(update)
                    reasons |= {delta.finish_reason for delta in update.deltas.values() if delta.finish_reason}
                    extra = {"usage": usage.body() if live_usage else None} if with_usage else {}
                    write = partial(self._events, head, extra, update, messages)
                    for written in await self.service.build(write, update.num_tokens):
                        yield written
        finally:
            self.service.release(tickets)
            self._note(usage, reasons)
        if with_usage:
            yield event({**head, "choices": [], "usage": usage.body()})

    def _events(
        self, head: dict[str, Any], extra: dict[str, Any], update: Update, messages: list[Message]
    ) -> list[bytes]:
        """Return the events that tell of `update`, none or several; for any thread."""
        found = []
        for index, delta in update.deltas.items():
            messages[index].take(delta)
            found += [event({**head, "choices": [body], **extra}) for body in self._chunks(index, messages[index])]
        return found

    def _chunks(self, index: int, message: Message) -> list[dict[str, Any]]:
        """Return the choices of the next events: who speaks, what is said, and how it ended."""
        bodies: list[dict[str, Any]] = []
        if not message.begun:
            message.begun = True
            role = {"role": "assistant", "content": ""}
            bodies.append({"index": index, "delta": role, "logprobs": None, "finish_reason": None})
        delta: dict[str, Any] = {"content": message.content} if message.content or not message.calls else {}
        if message.calls:
            delta["tool_calls"] = message.calls
        shown = message.content or message.calls or message.finish_reason or self.logprobs is not None or self.show_ids
        if shown:
            bodies.append({"index": index, "delta": delta, **self._ending(message)})
        return bodies


async def respond(request: Request, service: Service) -> ASGIApp:
    """Answer POST /v1/chat/completions."""
    return await respond_with(ChatJob, CHAT, request, service)
