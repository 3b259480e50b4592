"""LogitsProcessors: changes to the logits of a sequence before its next token is chosen."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Protocol

import torch

from kvloom.engine.params import SamplingParams
from kvloom.engine.structured import StructuredOutputs
from kvloom.errors import InvalidInputError
from kvloom.models.tokenizer import Tokenizer


class LogitsProcessor(Protocol):
    """Changes logits. One object may be given to many requests; `start` is called for each sequence."""

    def start(self) -> "LogitsProcessor":
        """Return the processor of one new sequence: itself, if it has no state between tokens."""

    def __call__(self, prompt_token_ids: Seq[int], output_token_ids: Seq[int], logits: torch.Tensor) -> None:
        """Change logits [V] float32 of the token after `output_token_ids`, in place; minus infinity forbids a token."""


class AllowedTokens:
    """Forbids every token but those of a list."""

    def __init__(self, token_ids: Seq[int]) -> None:
        self._allowed = torch.tensor(sorted(set(token_ids)))

    def start(self) -> "AllowedTokens":
        """Return itself."""
        return self

    def __call__(self, prompt_token_ids: Seq[int], output_token_ids: Seq[int], logits: torch.Tensor) -> None:
        """Forbid tokens that are not in the list."""
        kept = logits[self._allowed].clone()
        logits.fill_(float("-inf"))
        logits[self._allowed] = kept


class BadWords:
    """Forbids the last token of each word whose other tokens were just generated."""

    def __init__(self, words: Seq[Seq[int]]) -> None:
        self._words = [tuple(word) for word in words if word]

    def start(self) -> "BadWords":
        """Return itself."""
        return self

    def __call__(self, prompt_token_ids: Seq[int], output_token_ids: Seq[int], logits: torch.Tensor) -> None:
        """Forbid tokens that would complete a word."""
        for *before, last in self._words:
            if not before or list(output_token_ids[-len(before) :]) == before:
                logits[last] = float("-inf")


class Biases:
    """Adds numbers to the logits of some tokens."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._tokens = torch.tensor(list(biases))
        self._values = torch.tensor(list(biases.values()), dtype=torch.float32)

    def start(self) -> "Biases":
        """Return itself."""
        return self

    def __call__(self, prompt_token_ids: Seq[int], output_token_ids: Seq[int], logits: torch.Tensor) -> None:
        """Add the biases; forbidden tokens stay forbidden."""
        logits[self._tokens.to(logits.device)] += self._values.to(logits.device)


class ProcessorFactory:
    """Makes the processors of requests, or raises with the reason."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._structured = None if tokenizer is None else StructuredOutputs(tokenizer, vocab_size, eos_token_ids)

    def processors(self, params: SamplingParams) -> list[LogitsProcessor]:
        """Return the processors of a request, in the order in which they are applied.

        Raises `InvalidInputError` for tokens that the model does not have, schemas and grammars that cannot be read,
        and `UnsupportedError` where something that they need is not there.
        """
        found: list[LogitsProcessor] = []
        if params.allowed_token_ids is not None:
            wrong = [token for token in params.allowed_token_ids if token >= self.vocab_size]
            if wrong:
                raise InvalidInputError(
                    f"allowed_token_ids: this model has ids 0 to {self.vocab_size - 1}, not {wrong}"
                )
            found.append(AllowedTokens(params.allowed_token_ids))
        if params.bad_words:
            found.append(BadWords(self._spelled(params.bad_words)))
        if params.structured_outputs is not None:
            if self._structured is None:
                raise InvalidInputError("structured outputs need a tokenizer, which this engine does not have")
            found.append(self._structured.processor(params.structured_outputs))
        if params.logit_bias:
            found.append(Biases(params.logit_bias))
        found += params.logits_processors
        return found

    def _spelled(self, words: Seq[str]) -> list[list[int]]:
        """Return the token ids of each word, as it stands and after a space."""
        if self.tokenizer is None:
            raise InvalidInputError("bad_words need a tokenizer, which this engine does not have")
        bare = [word.lstrip(" ") for word in words]
        texts = [text for word in bare for text in (word, f" {word}")]
        return [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
