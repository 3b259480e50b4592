"""Intake: what this server takes from a body, and the tickets that it makes of it."""

import secrets
from collections.abc import Sequence

from kvloom.engine.engine import Engine
from kvloom.engine.params import SamplingParams
from kvloom.errors import InvalidInputError, KvloomError
from kvloom.registry import nearest
from kvloom.server.exchange import Context
from kvloom.server.feed import Feed
from kvloom.server.fields import Body
from kvloom.server.refusal import Refusal, bad_field
from kvloom.server.sampling import SamplingLimits
from kvloom.server.settings import ServerConfig
from kvloom.server.ticket import Ticket
from kvloom.spec.policy import PolicySpec


class Intake:
    """The served names, limits and rules of one model. Methods raise `Refusal` for what is not taken."""

    def __init__(self, engine: Engine, config: ServerConfig, names: Sequence[str]) -> None:
        self._engine = engine
        self._config = config
        self.names = names
        self.limits = SamplingLimits(config.max_logprobs, config.generation_defaults)

    def check_model(self, body: Body) -> str:
        """Return the served name that the body asks for; raises `Refusal` 404 naming the nearest one."""
        name: str = body.get("model", self.names[0])
        if name not in self.names:
            hint = nearest(name, list(self.names))
            known = ", ".join(self.names)
            raise Refusal(404, f"no model {name!r} here{hint}; served: {known}", param="model", code="model_not_found")
        return name

    def check_prompt(self, ids: Sequence[int], params: SamplingParams, policy: PolicySpec | None) -> int:
        """Return the most tokens that can be generated, under `policy` (None: the engine's own). For any thread.

        Raises `Refusal` `context_length_exceeded`, and the engine's own errors for what can never run.
        """
        try:
            evicts = self._engine.policies.policy_for(policy).evicts
        except KvloomError as error:
            raise bad_field("kv_policy", str(error), "unsupported") from None
        longest = self._engine.admission.max_position if evicts else self._engine.max_model_len
        if len(ids) >= longest and not evicts:
            raise _too_long(len(ids), longest)  # before every single id is checked
        try:
            return self._engine.check(ids, params, None, policy)
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
            keep = max(1, self._engine.max_model_len - (params.max_tokens or 1))
        return ids[-keep:]

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
        salt, priority, unique = self._salt(body, context), self._priority(body), secrets.token_hex(4)
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

    def _priority(self, body: Body) -> int:
        """Return the priority; raises `Refusal` where it would be ignored."""
        priority: int = body.get("priority", 0)
        if priority and self._config.scheduling_policy != "priority":
            raise bad_field("priority", "priority is not used here; start the server with --scheduling-policy priority")
        return priority

    def _salt(self, body: Body, context: Context) -> str:
        """Return the salt of the prefix cache: the body's, behind the caller's key where keys are kept apart."""
        salt: str = body.get("cache_salt", "")
        return f"{context.key_digest}:{salt}" if self._config.isolate_by_key else salt


def _too_long(length: int, longest: int) -> Refusal:
    return Refusal(
        400,
        f"This model's maximum context length is {longest} tokens. However, your prompt has {length} tokens, and at "
        "least one is generated. Shorten the prompt, send truncate_prompt_tokens, or raise --max-model-len "
        "(context_length_exceeded)",
        param="prompt",
        code="context_length_exceeded",
    )
