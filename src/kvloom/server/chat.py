"""/v1/chat/completions: conversations through the model's chat template, with tools where it has them."""

import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from kvloom.server.answer import Update
from kvloom.server.bodies import CHAT
from kvloom.server.dialect import COMPLETIONS, event
from kvloom.server.dialogue import Dialogue, Turn
from kvloom.server.exchange import Context, encode_large_json
from kvloom.server.fields import Body
from kvloom.server.job import respond_with
from kvloom.server.logprobs import LogprobFormat
from kvloom.server.message import Message
from kvloom.server.queue import Place
from kvloom.server.service import Service
from kvloom.server.ticket import Ticket


class ChatJob:
    """One body of /v1/chat/completions, and its answer as choices or chunks."""

    dialect = COMPLETIONS

    def __init__(self, service: Service, context: Context, body: Body, place: Place) -> None:
        self.context = context
        self.body = body
        self.model = service.intake.check_model(body)
        self.created = int(time.time())
        self.stream = bool(body.get("stream", False))
        self.show_ids = bool(body.get("return_token_ids", False))
        self.dialogue = Dialogue(service, context, body, place)
        self.names = LogprobFormat(
            service.tokenizer,
            count=self.dialogue.logprobs or 0,
            as_ids=bool(body.get("return_tokens_as_token_ids", False)),
            skip_special=self.dialogue.params.skip_special_tokens,
        )

    async def tickets(self) -> list[Ticket]:
        """Return the checked ticket of the conversation."""
        return await self.dialogue.tickets()

    def _head(self, kind: str) -> dict[str, Any]:
        name = f"chatcmpl-{self.context.answer_id}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model}

    # ---- whole ----------------------------------------------------------------------------------------------------

    async def answer(self, tickets: list[Ticket]) -> bytes:
        """Run the conversation to its end and return the whole body in JSON."""
        return await self.dialogue.answer(tickets, self._whole)

    def _whole(self, turn: Turn) -> bytes:
        """Return the body of an answer that has ended; for any thread."""
        choices = [self._choice(index, message) for index, message in enumerate(turn.messages)]
        extra: dict[str, Any] = {}
        if turn.prompt_logprobs is not None:
            extra["prompt_logprobs"] = self.names.prompt(turn.prompt_logprobs)
        if self.show_ids:
            extra["prompt_token_ids"] = turn.ticket.prompt_token_ids
        head = self._head("chat.completion")
        return encode_large_json({**head, "choices": choices, "usage": turn.usage.body(), **extra})

    def _choice(self, index: int, message: Message) -> dict[str, Any]:
        said: dict[str, Any] = {"role": "assistant", "content": message.content, "refusal": None}
        if message.reader is not None and message.reader.calls:
            said["content"] = message.content or None
            said["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in message.reader.calls]
        return {"index": index, "message": said, **self._ending(message)}

    def _ending(self, message: Message) -> dict[str, Any]:
        shown = None if self.dialogue.logprobs is None else self.names.chat(message.token_ids, message.logprobs)
        body = {"logprobs": shown, "finish_reason": message.finish_reason, "stop_reason": message.stop_reason}
        return {**body, "token_ids": message.token_ids} if self.show_ids else body

    # ---- streamed -------------------------------------------------------------------------------------------------

    def events(self, tickets: list[Ticket]) -> AsyncGenerator[bytes, None]:
        """Return a generator of the answer, event by event; closing the generator aborts what is left."""
        return self.dialogue.events(tickets, self._events, self._last_events)

    def _last_events(self, turn: Turn) -> list[bytes]:
        """Return the event that follows the last choice: the usage, where it was asked for."""
        if not self._with_usage("include_usage"):
            return []
        return [event({**self._head("chat.completion.chunk"), "choices": [], "usage": turn.usage.body()})]

    def _with_usage(self, option: str) -> bool:
        return bool(self.body.get("stream_options", {}).get(option, False))

    def _events(self, turn: Turn, update: Update) -> list[bytes]:
        """Return the events that tell of `update`, none or several; for any thread."""
        head = self._head("chat.completion.chunk")
        if self._with_usage("include_usage"):
            head["usage"] = turn.usage.body() if self._with_usage("continuous_usage_stats") else None
        found = []
        for index, delta in update.deltas.items():
            message = turn.messages[index]
            message.take(delta)
            found += [event({**head, "choices": [body]}) for body in self._chunks(index, message)]
        return found

    def _chunks(self, index: int, message: Message) -> list[dict[str, Any]]:
        """Return the choices of the next events: role, content or calls, and finish reason."""
        bodies: list[dict[str, Any]] = []
        if not message.begun:
            message.begun = True
            role = {"role": "assistant", "content": ""}
            bodies.append({"index": index, "delta": role, "logprobs": None, "finish_reason": None})
        content, calls = message.content, message.calls
        delta: dict[str, Any] = {"content": content} if content or not calls else {}
        if calls:
            delta["tool_calls"] = calls
        if content or calls or message.finish_reason or self.dialogue.logprobs is not None or self.show_ids:
            bodies.append({"index": index, "delta": delta, **self._ending(message)})
        return bodies


async def respond(request: Request, service: Service) -> ASGIApp:
    """Answer POST /v1/chat/completions."""
    return await respond_with(ChatJob, CHAT, request, service)
