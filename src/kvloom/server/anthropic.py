"""Anthropic's /v1/messages: a conversation answered as blocks of text and calls; and its tokens counted."""

import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from kvloom.server.answer import Update
from kvloom.server.anthropicfields import COUNT_TOKENS, MESSAGES
from kvloom.server.anthropicinput import conversation_of
from kvloom.server.conversation import conversation_ids, note_unused
from kvloom.server.dialect import ANTHROPIC, named_event
from kvloom.server.dialogue import Dialogue, Turn
from kvloom.server.exchange import Context, context_of, encode_large_json, json_response, unless_gone
from kvloom.server.fields import Body
from kvloom.server.job import adopt, respond_with
from kvloom.server.message import Message
from kvloom.server.parts import Growth, Part, Parts
from kvloom.server.queue import Place
from kvloom.server.service import Service
from kvloom.server.ticket import Ticket
from kvloom.server.tools import offered_tools
from kvloom.server.usage import Usage

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class AnthropicJob:
    """One body of /v1/messages, and its answer as a message or the events of one."""

    dialect = ANTHROPIC

    def __init__(self, service: Service, context: Context, body: Body, place: Place) -> None:
        self.context = context
        self.model = service.intake.check_model(body)
        self.stream = bool(body.get("stream", False))
        self.dialogue = Dialogue(service, context, conversation_of(body), place)
        self.parts = Parts()

    async def tickets(self) -> list[Ticket]:
        """Return the checked ticket of the conversation."""
        return await self.dialogue.tickets()

    # ---- whole ----------------------------------------------------------------------------------------------------

    async def answer(self, tickets: list[Ticket]) -> bytes:
        """Run the conversation to its end and return the whole message in JSON."""
        return await self.dialogue.answer(tickets, self._whole)

    def _whole(self, turn: Turn) -> bytes:
        """Return the message that has ended; for any thread."""
        (message,) = turn.messages
        self.parts.take(message.pieces, last=True)
        content = [self._block(part) for part in self.parts.all]
        return encode_large_json({**self._head(turn.usage), "content": content, **_ending(message)})

    def _head(self, usage: Usage) -> dict[str, Any]:
        kind = {"id": f"msg_{self.context.answer_id}", "type": "message", "role": "assistant", "model": self.model}
        return {**kind, "content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(usage)}

    def _block(self, part: Part) -> dict[str, Any]:
        """Return a part that has ended as a block; a call that was cut off has no input, which a warning says."""
        if part.call_id is None:
            return {"type": "text", "text": part.text, "citations": None}
        try:
            given = json.loads(part.text or "{}")
        except ValueError:
            given = {}
            self.dialogue.body.warnings.append(f"the input of the call of {part.name[:80]!r} is cut off and left out")
        return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": given}

    # ---- streamed -------------------------------------------------------------------------------------------------

    def events(self, tickets: list[Ticket]) -> AsyncGenerator[bytes, None]:
        """Return a generator of the message, event by event; closing the generator aborts what is left."""
        return self.dialogue.events(tickets, self._events)

    def _events(self, turn: Turn, update: Update) -> list[bytes]:
        """Return the events that tell of `update`; for any thread."""
        (message,) = turn.messages
        written = []
        if not message.begun:
            message.begun = True
            head = self._head(turn.usage)
            head["usage"]["output_tokens"] = 0
            written.append(named_event({"type": "message_start", "message": head}))
        for delta in update.deltas.values():
            message.take(delta)
            last = message.finish_reason is not None
            for growth in self.parts.take(message.pieces, last):
                written.append(self._grown(growth))
            if last:
                ending = {"delta": _ending(message), "usage": _usage(turn.usage)}
                written.append(named_event({"type": "message_delta", **ending}))
                written.append(named_event({"type": "message_stop"}))
        return written

    @staticmethod
    def _grown(growth: Growth) -> bytes:
        """Return the event of a part that began, grew or ended."""
        part, place = growth.part, {"index": growth.part.index}
        is_text = part.call_id is None
        if growth.began:
            text = {"type": "text", "text": "", "citations": None}
            call: dict[str, Any] = {"type": "tool_use", "id": part.call_id, "name": part.name, "input": {}}
            return named_event({"type": "content_block_start", **place, "content_block": text if is_text else call})
        if growth.more:
            more = {"type": "text_delta", "text": growth.more}
            given = {"type": "input_json_delta", "partial_json": growth.more}
            return named_event({"type": "content_block_delta", **place, "delta": more if is_text else given})
        return named_event({"type": "content_block_stop", **place})


def _ending(message: Message) -> dict[str, Any]:
    if message.finish_reason == "stop" and isinstance(message.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": message.stop_reason}
    return {"stop_reason": STOP_REASONS.get(message.finish_reason or "", "end_turn"), "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, Any]:
    """Return the counts under the names of this API, whose input tokens are those that the cache did not have."""
    body = usage.body()
    cached = body["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": body["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": body["completion_tokens"],
        "kv": body["kv"],
    }


async def respond(request: Request, service: Service) -> ASGIApp:
    """Answer POST /v1/messages."""
    return await respond_with(AnthropicJob, MESSAGES, request, service)


async def count_tokens(request: Request, service: Service) -> ASGIApp:
    """Answer POST /v1/messages/count_tokens: how many tokens the prompt of a conversation has."""
    body = await service.read_body(await service.receive_body(request), COUNT_TOKENS)
    adopt(context_of(request), body, service.config)
    service.intake.check_model(body)

    def count() -> int:
        conversation = conversation_of(body)
        tools = offered_tools(conversation, service.tokenizer.chat_template)
        note_unused(conversation, service.tokenizer.chat_template)
        return len(conversation_ids(service, conversation, None if tools is None else tools.offered))

    return json_response({"input_tokens": await unless_gone(request.receive, service.workers.offload(count))})
