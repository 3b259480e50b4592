"""StructuredOutputs: answers that follow a schema, an expression or a grammar, token by token, through xgrammar."""

from __future__ import annotations

import importlib.util
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence as Seq
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvloom.engine.structured_params import StructuredOutputsParams
from kvloom.errors import InvalidInputError, UnsupportedError
from kvloom.models.tokenizer import Tokenizer

MAX_COMPILED = 64
"""Compiled grammars that are kept, the latest used."""

MAX_REASON_CHARS = 300
FIRST_PRINTED = 0x20

Tokens = NDArray[np.bool_]


class StructuredOutputs:
    """Compiles grammars for one tokenizer. `processor` may be called from any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids or tokenizer.eos_token_ids
        self._compiled: OrderedDict[StructuredKey, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._compiling = threading.Lock()

    def processor(self, params: StructuredOutputsParams) -> GrammarProcessor:
        """Return what keeps an answer to the form that `params` ask for.

        Raises `InvalidInputError` when it cannot be read, `UnsupportedError` without xgrammar or tokens that end.
        """
        reasons = []
        if importlib.util.find_spec("xgrammar") is None:
            reasons.append("the package xgrammar is not installed; pip install 'kvloom[structured]'")
        if not self.eos_token_ids:
            reasons.append("the model has no token that ends an answer")
        if reasons:
            raise UnsupportedError("structured outputs", reasons)
        key = (params.kind, params.text, params.any_whitespace)
        compiled = self._known(key)
        if compiled is None:
            with self._compiling:  # apart from the other lock: who needs a known one does not wait for a new one
                compiled = self._known(key) or self._new(key, params)
        barred = self._control if params.kind in ("json", "json_object") else None
        return GrammarProcessor(compiled, self.vocab_size, self.eos_token_ids, barred)

    def _known(self, key: StructuredKey) -> Any:
        """Return what was compiled before, or None."""
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
            return self._compiled.get(key)

    def _new(self, key: StructuredKey, params: StructuredOutputsParams) -> Any:
        try:
            compiled = self._compile(params)
        except (RuntimeError, ValueError) as error:  # the latter where even the complaint is no valid text
            reason = (str(error).splitlines() or ["no reason is known"])[-1][-MAX_REASON_CHARS:]
            raise InvalidInputError(f"structured outputs: {params.kind} cannot be read: {reason}") from error
        with self._lock:
            self._compiled[key] = compiled
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return compiled

    def _compile(self, params: StructuredOutputsParams) -> Any:
        if params.kind == "json":
            return self._compiler.compile_json_schema(params.text, any_whitespace=params.any_whitespace)
        if params.kind == "json_object":
            return self._compiler.compile_json_schema('{"type": "object"}', any_whitespace=params.any_whitespace)
        if params.kind == "regex":
            return self._compiler.compile_regex(params.text)
        if params.kind == "choice":
            return self._compiler.compile_regex("|".join(re.escape(choice) for choice in json.loads(params.text)))
        return self._compiler.compile_grammar(params.text)

    @cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes of each token; tokens that mark structure spell nothing."""
        spelling, special = self.tokenizer.spelling, self.tokenizer.special_ids | set(self.eos_token_ids)
        return [b"" if token in special else spelling.piece(token) for token in range(self.vocab_size)]

    @cached_property
    def _control(self) -> Tokens:
        """Which tokens [V] hold control characters.

        None belongs into a string of JSON unescaped, but the grammars of strings with limits on their length let them
        in. White space needs none of them, so no answer in JSON has any.
        """
        return np.array([any(byte < FIRST_PRINTED for byte in piece) for piece in self._pieces])

    @cached_property
    def _compiler(self) -> Any:
        """The compiler for this vocabulary."""
        import xgrammar

        info = xgrammar.TokenizerInfo(self._pieces, stop_token_ids=list(self.eos_token_ids))
        return xgrammar.GrammarCompiler(info, max_threads=1)


StructuredKey = tuple[str, str, bool]


class GrammarProcessor:
    """A `LogitsProcessor` that forbids every token after which the grammar could not be fulfilled any more.

    `barred` [V] tokens are forbidden whatever the grammar says.
    """

    def __init__(self, compiled: Any, vocab_size: int, eos_token_ids: tuple[int, ...], barred: Tokens | None) -> None:
        self._compiled = compiled
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._barred = barred
        self._matcher: Any = None
        self._bits = np.zeros((1, -(-vocab_size // 32)), np.int32)
        self._num_accepted = 0

    def start(self) -> GrammarProcessor:
        """Return one that has read nothing yet."""
        return GrammarProcessor(self._compiled, self._vocab_size, self._eos_token_ids, self._barred)

    def __call__(self, prompt_token_ids: Seq[int], output_token_ids: Seq[int], logits: torch.Tensor) -> None:
        """Read the tokens that came since the last call, and forbid what cannot follow them."""
        if self._matcher is None:
            import xgrammar

            self._matcher = xgrammar.GrammarMatcher(self._compiled)
        for token in output_token_ids[self._num_accepted :]:
            if not self._matcher.is_terminated():
                self._matcher.accept_token(token)
        self._num_accepted = len(output_token_ids)
        if self._matcher.is_terminated():  # the answer is complete, and the request does not end by itself
            allowed = np.zeros(self._vocab_size, np.bool_)
            allowed[list(self._eos_token_ids)] = True
        else:
            self._matcher.fill_next_token_bitmask(self._bits)
            allowed = np.unpackbits(self._bits.view(np.uint8)[0], bitorder="little")[: self._vocab_size].astype(
                np.bool_
            )
            if self._barred is not None:
                allowed &= ~self._barred
        logits[~torch.from_numpy(allowed).to(logits.device)] = float("-inf")
