"""SamplingParams: how a request's tokens are chosen; names and meanings as in vLLM."""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvloom.engine.structured_params import StructuredOutputsParams
from kvloom.errors import InvalidInputError

if TYPE_CHECKING:
    from kvloom.engine.logits_processors import LogitsProcessor

MAX_LOGPROBS = 1024
MAX_STOP_STRINGS = 64


@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of one request; checked on construction (`InvalidInputError`).

    `temperature=0` is greedy. `top_k` 0 or -1 means all. `seed` makes the request's samples independent of the
    batch around it. `logprobs=k` returns the k best and the chosen token's, from the raw logits; the same for
    `prompt_logprobs`. `max_tokens=None` means up to the model's length. `bad_words` are never completed,
    `allowed_token_ids` are the only ones that may be generated, `structured_outputs` is the form of the answer, and
    `logits_processors` change logits in order, after `logit_bias` and before the penalties.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    logits_processors: "tuple[LogitsProcessor, ...]" = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, what in (("stop", "non-empty strings"), ("stop_token_ids", "token ids (integers from 0)")):
            if not isinstance(getattr(self, name), Sequence | Set):
                raise InvalidInputError(f"{name} must be {what}; got {getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInputError(f"{name} must be True or False, not {getattr(self, name)!r}")
        for name in ("n", "top_k", "min_tokens"):
            self._integer(name)
        for name in ("max_tokens", "seed", "logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._integer(name)
        self._range("n", 1, 256)
        self._number("temperature", 0.0, 100.0)
        self._range("top_k", -1, None)
        self._number("top_p", 0.0, 1.0)
        if self.top_p == 0:
            raise InvalidInputError("top_p is 0; it must be above 0 and at most 1")
        self._number("min_p", 0.0, 1.0)
        self._number("presence_penalty", -2.0, 2.0)
        self._number("frequency_penalty", -2.0, 2.0)
        self._number("repetition_penalty", 0.01, 100.0)
        self._range("min_tokens", 0, None)
        if self.max_tokens is not None:
            self._range("max_tokens", 1, None)
            if self.min_tokens > self.max_tokens:
                raise InvalidInputError(
                    f"min_tokens is {self.min_tokens}, above max_tokens, which is {self.max_tokens}"
                )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._range(name, 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOP_STRINGS or any(not isinstance(s, str) or not s for s in self.stop):
            raise InvalidInputError(f"stop must be at most {MAX_STOP_STRINGS} non-empty strings; got {self.stop!r}")
        if self.stop and not self.detokenize:
            raise InvalidInputError("stop strings need detokenize=True; use stop_token_ids instead")
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in self.stop_token_ids):
            raise InvalidInputError(f"stop_token_ids must be token ids (integers from 0); got {self.stop_token_ids!r}")
        self._check_words()
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidInputError(f"logit_bias maps token ids to numbers; got {self.logit_bias!r}")
        for token, bias in self.logit_bias.items():
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise InvalidInputError(f"logit_bias maps token ids to numbers; {token!r} is not a token id")
            if not isinstance(bias, int | float) or not math.isfinite(bias) or abs(bias) > 100:
                raise InvalidInputError(f"logit_bias of token {token} is {bias!r}; it must be from -100 to 100")

    def _check_words(self) -> None:
        object.__setattr__(self, "bad_words", tuple(self.bad_words))
        object.__setattr__(self, "logits_processors", tuple(self.logits_processors))
        if any(not isinstance(word, str) or not word.strip(" ") for word in self.bad_words):
            raise InvalidInputError(f"bad_words must be non-empty strings; got {self.bad_words!r}")
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
            if not self.allowed_token_ids or any(
                isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in self.allowed_token_ids
            ):
                wrong = self.allowed_token_ids
                raise InvalidInputError(
                    f"allowed_token_ids must be token ids (integers from 0), one or more; got {wrong!r}"
                )
        if self.structured_outputs is not None:
            if not isinstance(self.structured_outputs, StructuredOutputsParams):
                raise InvalidInputError("structured_outputs must be StructuredOutputsParams")
            if self.min_tokens or self.ignore_eos:
                raise InvalidInputError(
                    "structured_outputs end where their form does; leave out min_tokens, ignore_eos"
                )

    @property
    def greedy(self) -> bool:
        """True when the most likely token is always taken."""
        return self.temperature == 0

    def _integer(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidInputError(f"{name} must be an integer, not {value!r}")

    def _number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InvalidInputError(f"{name} must be a finite number, not {value!r}")
        if not low <= value <= high:
            raise InvalidInputError(f"{name} is {value}; it must be from {low:g} to {high:g}")

    def _range(self, name: str, low: int, high: int | None) -> None:
        value = getattr(self, name)
        if value < low or (high is not None and value > high):
            limit = f"from {low} to {high}" if high is not None else f"at least {low}"
            raise InvalidInputError(f"{name} is {value}; it must be {limit}")
