"""Job: the requests of one body, and the common code that answers every job, streamed or whole."""

from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Protocol

from starlette.requests import Request
from starlette.types import ASGIApp

from kvloom.server.dialect import Dialect
from kvloom.server.eventstream import EventStream, primed
from kvloom.server.exchange import Context, context_of, encoded_response, unless_gone
from kvloom.server.fields import Body, Field
from kvloom.server.queue import Place
from kvloom.server.refusal import Refusal, bad_field
from kvloom.server.service import Service
from kvloom.server.settings import ServerConfig
from kvloom.server.ticket import Ticket

FIRST_NEWS_PATIENCE = 10.0
"""Seconds for which a streamed answer may still become an error status."""


class Job(Protocol):
    """The requests of one body, and the format of their answers in a reply."""

    stream: bool

    @property
    def dialect(self) -> Dialect:
        """How errors of the stream and its end are written."""

    async def tickets(self) -> list[Ticket]:
        """Return the checked tickets of the requests."""

    async def answer(self, tickets: list[Ticket]) -> bytes:
        """Return the whole reply in JSON when all have ended."""

    def events(self, tickets: list[Ticket]) -> AsyncGenerator[bytes, None]:
        """Yield the reply's events as text comes."""


async def respond_with(
    make: Callable[[Service, Context, Body, Place], Job], table: Mapping[str, Field], request: Request, service: Service
) -> ASGIApp:
    """Read a body by `table`, run the job that `make` makes of it, and answer."""
    context = context_of(request)
    config = service.config
    service.check_open()
    service.queue.check(1)  # a body that will be refused need not be read
    raw = await service.receive_body(request)
    with service.queue.place() as place:
        body = await service.read_body(raw, table)
        adopt(context, body, config)
        job = make(service, context, body, place)
        tickets = await unless_gone(request.receive, job.tickets())
        if job.stream:
            events = await unless_gone(request.receive, primed(job.events(tickets), FIRST_NEWS_PATIENCE))
            return EventStream(events, service.dog, job.dialect)
        return encoded_response(await unless_gone(request.receive, job.answer(tickets)))


UNLOGGED = (
    "prompt", "messages", "tools", "stop", "stop_sequences", "logit_bias", "input", "instructions", "system", "text",
    "output_config", "metadata", "cache_salt", "bad_words", "allowed_token_ids",
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
)  # fmt: skip
"""Fields with users' text or large contents; never logged."""


def adopt(context: Context, body: Body, config: ServerConfig) -> None:
    """Take the warnings about `body` and its `request_id` over into the context, and its options if they are logged."""
    body.warnings[:0] = context.warnings
    context.warnings = body.warnings  # the same list, so that later warnings are included
    if config.enable_log_requests:
        context.facts["options"] = {name: value for name, value in body.values.items() if name not in UNLOGGED}
    if "stream_options" in body and not body.get("stream", False):
        raise Refusal(400, "stream_options needs stream=true", param="stream_options")
    name = body.get("request_id")
    if name is not None:
        if not all(c.isalnum() or c in "-_.:" for c in name) or not name.isascii():
            raise bad_field("request_id", "request_id may hold letters, digits and -_.: only")
        context.request_id = name
