"""Dialogue: a conversation on its way through the engine, whichever API it came by."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from kvloom.engine.params import SamplingParams
from kvloom.engine.structured_params import StructuredOutputsParams
from kvloom.server.answer import Delta, Update
from kvloom.server.conversation import conversation_ids, note_unused
from kvloom.server.exchange import Context
from kvloom.server.fields import Body
from kvloom.server.kvpolicy import read_kv_policy
from kvloom.server.message import Message
from kvloom.server.queue import Place
from kvloom.server.refusal import bad_field
from kvloom.server.service import Service
from kvloom.server.ticket import Ticket
from kvloom.server.toolcalls import BEGIN, ToolCallReader
from kvloom.server.tools import offered_tools
from kvloom.server.usage import Usage


@dataclass
class Turn:
    """The assistant's turn: its messages, one an answer, what they cost, and the prompt's log-probabilities."""

    ticket: Ticket
    messages: list[Message]
    usage: Usage
    prompt_logprobs: list[Any] | None = None


class Dialogue:
    """The conversation of a body of /v1/chat/completions: checked, encoded and answered.

    Other APIs write their bodies as such a one. Raises `Refusal` for what cannot be done, naming fields of that body.
    """

    def __init__(self, service: Service, context: Context, body: Body, place: Place) -> None:
        self.service = service
        self.context = context
        self.body = body
        self.n: int = body.get("n", 1)
        self.tools = offered_tools(body, service.tokenizer.chat_template)
        note_unused(body, service.tokenizer.chat_template)
        self.logprobs = self._num_logprobs()
        self.params = self._params()
        self.policy = read_kv_policy(body.get("kv_policy"))
        self._place = place

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
        params = self.service.intake.limits.params(self.body, n=self.n, max_tokens=max_tokens, logprobs=self.logprobs)
        if self.tools is not None and params.structured_outputs is not None:
            raise bad_field("tools", "an answer of a given form holds no calls; send tool_choice 'none' or ask no form")
        return params

    # ---- the prompt -----------------------------------------------------------------------------------------------

    async def tickets(self) -> list[Ticket]:
        """Return the checked ticket of the conversation; template and tokenisation run in the pool."""
        if self.tools is not None and self.tools.bound:
            form = await self.service.workers.compiling(self._form_of_calls)
            self.params = replace(self.params, structured_outputs=form)
        await self.service.prepare(self.params)
        ids = await self.service.workers.offload(self._encoded)
        return self.service.intake.tickets(self.context, self.body, [(ids, None)], self.params, self.policy)

    def _encoded(self) -> list[int]:
        """Return the conversation's token ids, checked against the model; for a thread of the pool."""
        offered = None if self.tools is None else self.tools.offered
        ids = conversation_ids(self.service, self.body, offered)
        if self.tools is not None and self.tools.forced:  # the answer begins inside a call
            ids += self.service.tokenizer.encode(f"{BEGIN}\n", add_special_tokens=False)
        ids = self.service.intake.truncated(ids, self.body, self.params)
        if not ids:
            raise bad_field("messages", "the conversation comes to no token at all")
        self.service.intake.check_prompt(ids, self.params, self.policy)
        return ids

    def _form_of_calls(self) -> StructuredOutputsParams:
        """Return the form of forced or strict calls; for a thread that compiles."""
        assert self.tools is not None
        engine = self.service.engine
        return self.tools.form(
            lambda form: engine.processors.processors(SamplingParams(structured_outputs=form)), self.body.warnings
        )

    # ---- the answer -----------------------------------------------------------------------------------------------

    async def answer(self, tickets: list[Ticket], write: Callable[[Turn], bytes]) -> bytes:
        """Run the conversation to its end and return what `write` makes of it, which runs in any thread."""
        turn = self._turn(tickets)
        whole = [Delta() for _ in turn.messages]
        feed = self.service.submit(tickets, self._place)
        try:
            async for updates in feed:
                for update in updates:
                    turn.usage.count(update)
                    turn.prompt_logprobs = update.prompt_logprobs or turn.prompt_logprobs
                    for index, delta in update.deltas.items():
                        whole[index].add(delta)
        finally:
            self.service.release(tickets)

        def written() -> bytes:
            for message, delta in zip(turn.messages, whole, strict=True):
                message.take(delta)
            self._note(turn, {str(message.finish_reason) for message in turn.messages})
            return write(turn)

        num_tokens = sum(len(delta.token_ids) for delta in whole) + len(turn.prompt_logprobs or ())
        return await self.service.workers.build(written, num_tokens)

    async def events(
        self,
        tickets: list[Ticket],
        write: Callable[[Turn, Update], list[bytes]],
        end: Callable[[Turn], list[bytes]] = lambda _: [],
    ) -> AsyncGenerator[bytes, None]:
        """Yield what `write` makes of each update, in any thread, and then what `end` makes of the turn.

        Closing the generator aborts what is left.
        """
        turn = self._turn(tickets)
        feed = self.service.submit(tickets, self._place)
        reasons: set[str] = set()
        try:
            async for updates in feed:
                for update in updates:
                    turn.usage.count(update)
                    reasons |= {delta.finish_reason for delta in update.deltas.values() if delta.finish_reason}
                    for written in await self.service.workers.build(partial(write, turn, update), update.num_tokens):
                        yield written
        finally:
            self.service.release(tickets)
            self._note(turn, reasons)
        for written in end(turn):
            yield written

    def _turn(self, tickets: list[Ticket]) -> Turn:
        """Return the turn that answers the conversation's ticket, of which nothing has been said."""
        (ticket,) = tickets
        return Turn(ticket, [self._message() for _ in range(self.n)], self.service.usage(tickets))

    def _message(self) -> Message:
        only_first = self.body.get("parallel_tool_calls") is False
        return Message(None if self.tools is None else ToolCallReader(only_first, inside=self.tools.forced))

    def _note(self, turn: Turn, reasons: set[str]) -> None:
        usage = turn.usage
        self.context.facts.update(
            prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens, finish_reasons=sorted(reasons)
        )
