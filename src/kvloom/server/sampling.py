"""From the fields of a body to `SamplingParams`, within the server's limits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvloom.engine.params import SamplingParams
from kvloom.errors import InvalidInputError
from kvloom.server.bodies import MAX_LOGIT_BIASES
from kvloom.server.fields import Body
from kvloom.server.form import read_form
from kvloom.server.refusal import bad_field

DIRECT = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "min_tokens",
    "include_stop_str_in_output",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "skip_special_tokens",
)
"""Fields that mean the same in a body and in `SamplingParams`."""

GENERATION_CONFIG = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Entries of a model's generation_config.json that serve as defaults."""


@dataclass(frozen=True)
class SamplingLimits:
    """Limits of one request, and the defaults of this server."""

    max_logprobs: int
    defaults: Mapping[str, Any]

    def params(self, body: Body, *, n: int, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Return the parameters; raises `Refusal` for a field beyond its limit or at odds with another."""
        prompt_logprobs = body.get("prompt_logprobs")
        for name, value in (("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)):
            if value is not None and value > self.max_logprobs:
                raise bad_field(name, f"{name} is {value}; this server gives at most {self.max_logprobs}")
        values = {**self.defaults, **{name: body.get(name) for name in DIRECT if name in body}}
        try:
            return SamplingParams(
                n=n,
                max_tokens=max_tokens,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                stop=_stops(body),
                stop_token_ids=tuple(body.get("stop_token_ids", ())),
                logit_bias=_biases(body),
                bad_words=tuple(body.get("bad_words", ())),
                allowed_token_ids=body.get("allowed_token_ids"),
                structured_outputs=read_form(body),
                **values,
            )
        except InvalidInputError as error:
            raise bad_field(str(error).split(" ", 1)[0], str(error)) from None


def generation_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling defaults in a model's generation_config.json; entries of the wrong type are left out."""
    found = {}
    for name in GENERATION_CONFIG:
        value = config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value
    return found


def _stops(body: Body) -> tuple[str, ...]:
    stop = body.get("stop", ())
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _biases(body: Body) -> dict[int, float]:
    given = body.get("logit_bias", {})
    if len(given) > MAX_LOGIT_BIASES:
        raise bad_field("logit_bias", f"logit_bias has {len(given)} tokens; at most {MAX_LOGIT_BIASES} are taken")
    biases: dict[int, float] = {}
    for token, bias in given.items():
        if not (token.isascii() and token.isdigit() and len(token) < 19):
            raise bad_field("logit_bias", f"logit_bias maps token ids to numbers; {token[:40]!r} is not a token id")
        biases[int(token)] = bias
    return biases
