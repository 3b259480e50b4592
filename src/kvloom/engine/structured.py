"""StructuredOutputs: answers that follow a schema, an expression or a grammar, token by token, through llguidance."""

from __future__ import annotations

import importlib.util
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from functools import cached_property
from typing import Any

import numpy as np
import torch

from kvloom.engine.structured_params import StructuredOutputsParams
from kvloom.engine.structured_schema import fault_of
from kvloom.errors import InvalidInputError, RequestFailedError, UnsupportedError
from kvloom.models.tokenizer import Tokenizer

MAX_COMPILED = 64
"""Compiled grammars that are kept, the latest used."""

MAX_REASON_CHARS = 300
COMPACT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
BLANKS: Any = {"whitespace_flexible": True, "whitespace_pattern": " {1,8}"}
"""How JSON is laid out: as `json.dumps` does, or with blanks between its parts."""


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
        """Return the processor that constrains an answer to the form of `params`.

        Raises `InvalidInputError` when the form cannot be parsed or not be enforced in full, `UnsupportedError` without
        llguidance or end tokens.
        """
        reasons = []
        if importlib.util.find_spec("llguidance") is None:
            reasons.append("the package llguidance is not installed; pip install 'kvloom[structured]'")
        if not self.eos_token_ids:
            reasons.append("the model has no token that ends an answer")
        if reasons:
            raise UnsupportedError("structured outputs", reasons)
        key = (params.kind, params.text, params.any_whitespace)
        compiled = self._known(key)
        if compiled is None:
            with self._compiling:  # a separate lock, so that compiled grammars can be used meanwhile
                compiled = self._known(key) or self._new(key, params)
        return GrammarProcessor(compiled, self.vocab_size, self.eos_token_ids)

    def _known(self, key: StructuredKey) -> Any:
        """Return what was compiled before, or None."""
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
            return self._compiled.get(key)

    def _new(self, key: StructuredKey, params: StructuredOutputsParams) -> Any:
        import llguidance

        try:
            compiled = llguidance.LLMatcher(self._tokens, self._grammar(params), log_level=0)
        except InvalidInputError:
            raise
        except (RuntimeError, ValueError) as error:  # the latter for text that has no encoding
            raise _unreadable(params.kind, str(error)) from error
        if compiled.is_error():
            raise _unreadable(params.kind, compiled.get_error())
        with self._lock:
            self._compiled[key] = compiled
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return compiled

    def _grammar(self, params: StructuredOutputsParams) -> str:
        """Return the grammar in the library's format; raises `InvalidInputError`."""
        from llguidance import LLMatcher
        from llguidance.gbnf_to_lark import any_to_lark

        if params.kind in ("json", "json_object"):
            return self._schema(params)
        if params.kind == "regex":
            return str(LLMatcher.grammar_from_regex(params.text))
        if params.kind == "choice":
            return str(LLMatcher.grammar_from_regex("|".join(re.escape(choice) for choice in json.loads(params.text))))
        try:
            return str(LLMatcher.grammar_from_lark(any_to_lark(params.text)))
        except Exception as error:  # the converter raises bare Exceptions
            raise _unreadable(params.kind, str(error)) from error

    def _schema(self, params: StructuredOutputsParams) -> str:
        """Return the grammar of a JSON schema that is enforced in full; raises `InvalidInputError` with the pointer."""
        from llguidance import LLMatcher

        layout = BLANKS if params.any_whitespace else COMPACT
        schema = json.loads(params.text) if params.kind == "json" else {"type": "object"}

        def complaint(part: Any) -> str:
            """Return the library's error for a schema, empty when it enforces all of it."""
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(part), overrides=layout)
            return str(LLMatcher.validate_grammar(grammar, self._tokens))

        fault = fault_of(schema, complaint)
        if fault is not None:
            pointer, reason = fault
            raise InvalidInputError(
                f"structured outputs: the JSON schema cannot be kept to at {pointer!r}: {_short(reason)}. "
                "Change this part, or ask for less and check the answer yourself"
            )
        return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=layout))

    @cached_property
    def _tokens(self) -> Any:
        """The vocabulary in the library's format: the bytes of each token; control tokens have none."""
        import llguidance

        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(self)))

    @property
    def pieces(self) -> list[bytes]:
        """The bytes of each token; control tokens have none."""
        spelling, special = self.tokenizer.spelling, self.special_ids
        return [b"" if token in special else spelling.piece(token) for token in range(self.vocab_size)]

    @property
    def special_ids(self) -> set[int]:
        """Ids of control tokens."""
        return {*self.tokenizer.special_ids, *self.eos_token_ids}


StructuredKey = tuple[str, str, bool]


class _Vocabulary:
    """A tokenizer with the interface that llguidance expects."""

    def __init__(self, owner: StructuredOutputs) -> None:
        self.eos_token_id = owner.eos_token_ids[0]
        self.bos_token_id = None
        self.tokens = owner.pieces
        self.special_token_ids = sorted(owner.special_ids)
        self._encode = owner.tokenizer.encode
        self._ids = {piece: token for token, piece in enumerate(self.tokens) if piece}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes | str) -> list[int]:
        """Return token ids that spell exactly `text`, the tokenizer's own where they do.

        The library allows only these where the grammar determines the text. A tokenizer may add a blank before a text
        or lack a character; then the longest tokens that fit are taken, one after another.
        """
        raw = text.encode() if isinstance(text, str) else bytes(text)
        found = self._encode(raw.decode("utf-8", "replace"), False)
        if b"".join(self.tokens[token] for token in found if token < len(self.tokens)) == raw:
            return found
        return list(self._spelled(raw))

    def _spelled(self, raw: bytes) -> Iterator[int]:
        begin = 0
        while begin < len(raw):
            ends = range(min(len(raw), begin + self._longest), begin, -1)
            end = next((end for end in ends if raw[begin:end] in self._ids), None)
            if end is None:
                return
            yield self._ids[raw[begin:end]]
            begin = end


class GrammarProcessor:
    """A `LogitsProcessor` that forbids every token after which the grammar can no longer be satisfied."""

    def __init__(self, compiled: Any, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._compiled = compiled
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._matcher: Any = None
        self._bits = np.zeros((1, -(-vocab_size // 32)), np.int32)
        self._num_accepted = 0

    def start(self) -> GrammarProcessor:
        """Return a processor without tokens."""
        return GrammarProcessor(self._compiled, self._vocab_size, tuple(self._eos_token_ids))

    def __call__(self, prompt_token_ids: Seq[int], output_token_ids: Seq[int], logits: torch.Tensor) -> None:
        """Read the new tokens, and forbid those that cannot follow.

        Raises `RequestFailedError` when the grammar needs more work at one token than the library allows.
        """
        if self._matcher is None:
            self._matcher = self._compiled.deep_copy()
        for token in output_token_ids[self._num_accepted :]:
            if not self._matcher.is_stopped():
                self._matcher.consume_token(token)
        self._num_accepted = len(output_token_ids)
        logits[~torch.from_numpy(self._allowed()).to(logits.device)] = float("-inf")

    def _allowed(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return which tokens [V] may come next."""
        if not self._matcher.is_stopped():
            self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            raise RequestFailedError(
                f"the form of the answer cannot be followed any further: {_short(self._matcher.get_error())}. Ask for "
                "a simpler one: left recursion in place of right, fewer parts that may be empty, fewer alternatives"
            )
        if self._matcher.is_stopped():  # complete, though the request does not end by itself
            allowed = np.zeros(self._vocab_size, np.bool_)
            allowed[self._eos_token_ids] = True
            return allowed
        bits = np.unpackbits(self._bits.view(np.uint8)[0], bitorder="little")
        allowed = bits[: self._vocab_size].astype(np.bool_)
        allowed[self._eos_token_ids] = allowed[self._eos_token_ids[0]]
        return allowed


def _unreadable(kind: str, reason: str) -> InvalidInputError:
    return InvalidInputError(f"structured outputs: {kind} cannot be read: {_short(reason)}")


def _short(reason: str) -> str:
    """Return an error of the library on one line."""
    return " ".join(reason.partition("<state>")[0].split())[:MAX_REASON_CHARS] or "no reason is known"
