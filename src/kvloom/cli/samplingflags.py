"""Flags of sampling: the fields of `SamplingParams`, under the same names."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from kvloom.cli.command import Flag
from kvloom.cli.values import Text, TokenBiases, TokenCount
from kvloom.engine.params import SamplingParams

_DEFAULTS = {field.name: field.default for field in fields(SamplingParams)}


def _flag(name: str, help: str, **attributes: Any) -> Flag:
    """Return the flag of one field of `SamplingParams`, with the field's default unless `attributes` has another."""
    field = name.removeprefix("--").split("/")[0].replace("-", "_")
    attributes.setdefault("default", _DEFAULTS[field])
    return Flag([name], section="Sampling", help=help, **attributes)


SAMPLING_FLAGS = [
    _flag("--temperature", "0 takes the likeliest token: the same answer every time.", type=float, default=0.0),
    _flag("--top-k", "Sample among the K likeliest tokens; 0 is all.", type=int),
    _flag("--top-p", "Sample among the likeliest tokens that together have this probability.", type=float),
    _flag("--min-p", "Sample among tokens with at least this share of the best one's probability.", type=float),
    _flag("--seed", "Makes sampling repeatable.", type=int),
    _flag(
        "--max-tokens", "Longest answer; auto: up to --max-model-len.", type=TokenCount(), metavar="TOKENS", default=256
    ),
    _flag("--min-tokens", "Shortest answer: no end of sequence and no stop before.", type=int, metavar="TOKENS"),
    _flag(
        "--stop",
        "End the answer before this text; may be repeated, and KVLOOM_STOP may be a JSON list.",
        type=Text(),
        multiple=True,
    ),
    _flag("--stop-token-ids", "End the answer at this token; may be repeated.", type=int, metavar="ID", multiple=True),
    _flag("--include-stop-str-in-output", "Keep the stop text in the answer.", is_flag=True),
    _flag("--ignore-eos", "Continue past the model's end of sequence, to --max-tokens.", is_flag=True),
    _flag("--presence-penalty", "Subtracted from the logits of tokens in the answer.", type=float),
    _flag("--frequency-penalty", "Subtracted from the logits of tokens, once per use in the answer.", type=float),
    _flag("--repetition-penalty", "Divides the logits of tokens in prompt or answer; 1 is none.", type=float),
    _flag(
        "--logit-bias",
        """Added to the logits of tokens: '{"17": -5}'.""",
        type=TokenBiases(),
        metavar="JSON",
        default=None,
    ),
    _flag("--skip-special-tokens/--no-skip-special-tokens", "Leave control tokens out of the text."),
]
"""Flags of one answer."""

COMPLETION_FLAGS = [
    _flag("--n", "Answers to the prompt; it is computed once.", type=int),
    _flag("--logprobs", "With --json: log-probabilities of each token and of the K best.", type=int, metavar="K"),
    _flag("--prompt-logprobs", "With --json: the same for the prompt.", type=int, metavar="K"),
]
"""Flags that ask for several answers or for log-probabilities."""


def sampling_params(values: Mapping[str, Any]) -> SamplingParams:
    """Return the `SamplingParams` that the flags among `values` describe; raises `InvalidInputError`."""
    names = {str(flag.name) for flag in SAMPLING_FLAGS + COMPLETION_FLAGS}
    given = {name: value for name, value in values.items() if name in names}
    if given.get("logit_bias") is None:
        given.pop("logit_bias", None)
    return SamplingParams(**given)
