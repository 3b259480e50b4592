"""/v1/responses: a conversation answered as a list of items, without keeping anything."""

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from kvloom.errors import KvloomError
from kvloom.server.answer import Update
from kvloom.server.dialect import Dialect, named_event
from kvloom.server.dialogue import Dialogue, Turn
from kvloom.server.exchange import Context, encode_large_json
from kvloom.server.fields import Body
from kvloom.server.job import respond_with
from kvloom.server.parts import Growth, Part, Parts
from kvloom.server.queue import Place
from kvloom.server.refusal import Refusal, refusal_of
from kvloom.server.responsesfields import RESPONSES
from kvloom.server.responsesinput import NAMES, conversation_of
from kvloom.server.service import Service
from kvloom.server.ticket import Ticket
from kvloom.server.usage import Usage


class ResponsesJob:
    """One body of /v1/responses, and its answer as a response or the events of one."""

    def __init__(self, service: Service, context: Context, body: Body, place: Place) -> None:
        self.context = context
        self.body = body
        self.model = service.intake.check_model(body)
        self.created = int(time.time())
        self.stream = bool(body.get("stream", False))
        self.dialect = Dialect(Refusal.body, self._failure)
        with _own_names():
            self.dialogue = Dialogue(service, context, conversation_of(body), place)
        self.parts = Parts()
        self._num_events = 0

    async def tickets(self) -> list[Ticket]:
        """Return the checked ticket of the conversation."""
        with _own_names():
            return await self.dialogue.tickets()

    # ---- whole ----------------------------------------------------------------------------------------------------

    async def answer(self, tickets: list[Ticket]) -> bytes:
        """Run the conversation to its end and return the whole response in JSON."""
        return await self.dialogue.answer(tickets, self._whole)

    def _whole(self, turn: Turn) -> bytes:
        """Return the response that has ended; for any thread."""
        (message,) = turn.messages
        self.parts.take(message.pieces, last=True)
        return encode_large_json(self._response(_status(message.finish_reason), turn.usage))

    def _response(self, status: str, usage: Usage | None = None, error: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the response as it is now."""
        body, params = self.body, self.dialogue.params
        return {
            "id": f"resp_{self.context.answer_id}",
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata", {}),
            "model": self.model,
            "output": [self._item(part, self._end_of(part, status)) for part in self.parts.all],
            "parallel_tool_calls": body.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "reasoning": {"effort": body.get("reasoning", {}).get("effort"), "summary": None},
            "store": False,
            "temperature": params.temperature,
            "text": {"format": body.get("text", {}).get("format", {"type": "text"})},
            "tool_choice": body.get("tool_choice", "auto"),
            "tools": body.get("tools", []),
            "top_logprobs": 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
        }

    def _end_of(self, part: Part, status: str) -> str:
        """Return how `part` stands in a response of `status`, which only its last part may be short of."""
        cut = status in ("incomplete", "failed") and part is self.parts.all[-1]
        return "incomplete" if cut else "completed"

    def _item(self, part: Part, status: str) -> dict[str, Any]:
        """Return a part as an item of the output."""
        name = self._item_id(part)
        if part.call_id is not None:
            call = {"call_id": part.call_id, "name": part.name, "arguments": part.text}
            return {"type": "function_call", "id": name, "status": status, **call}
        content = [] if status == "in_progress" else [_text_part(part.text)]
        return {"type": "message", "id": name, "status": status, "role": "assistant", "content": content}

    def _item_id(self, part: Part) -> str:
        kind = "msg" if part.call_id is None else "fc"
        return f"{kind}_{self.context.answer_id}-{part.index}"

    # ---- streamed -------------------------------------------------------------------------------------------------

    def events(self, tickets: list[Ticket]) -> AsyncGenerator[bytes, None]:
        """Return a generator of the response, event by event; closing the generator aborts what is left."""
        return self.dialogue.events(tickets, self._events)

    def _events(self, turn: Turn, update: Update) -> list[bytes]:
        """Return the events that tell of `update`; for any thread."""
        (message,) = turn.messages
        written = []
        if not message.begun:
            message.begun = True
            begun = self._response("in_progress")
            written += [self._event("response.created", response=begun)]
            written += [self._event("response.in_progress", response=begun)]
        for delta in update.deltas.values():
            message.take(delta)
            last = message.finish_reason is not None
            status = _status(message.finish_reason) if last else "in_progress"
            for growth in self.parts.take(message.pieces, last):
                written += self._grown(growth, status)
            if last:
                written.append(self._event(f"response.{status}", response=self._response(status, turn.usage)))
        return written

    def _grown(self, growth: Growth, status: str) -> Iterator[bytes]:
        """Yield the events of a part that began, grew or ended while the response had `status`."""
        part, place = growth.part, {"output_index": growth.part.index}
        inside = {"item_id": self._item_id(part), **place}
        kind = "output_text" if part.call_id is None else "function_call_arguments"
        text = {"content_index": 0, "logprobs": []} if part.call_id is None else {}
        if growth.began:
            empty = Part(part.index, "", part.call_id, part.name)
            yield self._event("response.output_item.added", **place, item=self._item(empty, "in_progress"))
            if part.call_id is None:
                yield self._event("response.content_part.added", **inside, content_index=0, part=_text_part(""))
        elif growth.more:
            yield self._event(f"response.{kind}.delta", **inside, **text, delta=growth.more)
        else:
            said = {"text": part.text} if part.call_id is None else {"name": part.name, "arguments": part.text}
            yield self._event(f"response.{kind}.done", **inside, **text, **said)
            if part.call_id is None:
                yield self._event("response.content_part.done", **inside, content_index=0, part=_text_part(part.text))
            item = self._item(part, self._end_of(part, status))
            yield self._event("response.output_item.done", **place, item=item)

    def _event(self, kind: str, **entries: Any) -> bytes:
        number, self._num_events = self._num_events, self._num_events + 1
        return named_event({"type": kind, "sequence_number": number, **entries})

    def _failure(self, refusal: Refusal) -> bytes:
        error = {"code": refusal.code or "server_error", "message": refusal.message}
        said = self._event("error", **error, param=refusal.param)
        return said + self._event("response.failed", response=self._response("failed", error=error))


@contextmanager
def _own_names() -> Iterator[None]:
    """Let refusals of the conversation name the fields of this body."""
    try:
        yield
    except (Refusal, KvloomError) as error:
        refusal = error if isinstance(error, Refusal) else refusal_of(error)
        refusal.param = NAMES.get(refusal.param or "", refusal.param)
        raise refusal from None


def _status(finish_reason: str | None) -> str:
    return "incomplete" if finish_reason == "length" else "completed"


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, Any]:
    """Return the counts under the names of this API; prefixes are written to the cache at no price."""
    body = usage.body()
    return {
        "input_tokens": body["prompt_tokens"],
        "input_tokens_details": {**body["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": body["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": body["total_tokens"],
        "kv": body["kv"],
    }


async def respond(request: Request, service: Service) -> ASGIApp:
    """Answer POST /v1/responses."""
    return await respond_with(ResponsesJob, RESPONSES, request, service)
