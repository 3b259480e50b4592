"""Tokens that end an answer in a GGUF file: those in its metadata, and those recognised by their names."""

from collections.abc import Mapping
from typing import Any

import numpy as np

CONTROL_TOKEN = 3
"""The type of tokens that mark structure (`tokenizer.ggml.token_type`)."""

_KEYS = ("eos", "eot", "eom")

_ALWAYS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<|eom_id|>"),
    *("<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>", "<turn|>"),
}
"""Names that end an answer, whatever type the file gives them; ordinary text does not contain them."""

_AS_CONTROL = {"</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"}
"""Names that end an answer where the token is a control token. Gemma, for one, has `</s>` for HTML."""

_HARMONY = {"<|return|>", "<|call|>", "<|end|>"}
"""With these three, `<|end|>` ends a message and not the answer, which may continue in another channel."""


def is_end(token: str, kind: int) -> bool:
    """Return whether a token of type `kind` ends an answer by its name. The names are those of llama.cpp."""
    return token in _ALWAYS or (kind == CONTROL_TOKEN and token in _AS_CONTROL)


def end_token_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Return the ids of all tokens that end an answer: those with a role first, then the others in order.

    Converters often write one id only, and not always that of the end of a turn; an answer would then continue with a
    made-up turn of the user.
    """
    found = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in _KEYS]
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list):
        kinds = types.tolist() if isinstance(types, np.ndarray) and len(types) == len(tokens) else [1] * len(tokens)
        named = {token: index for index, token in enumerate(tokens) if is_end(token, kinds[index])}
        if named.keys() >= _HARMONY:
            del named["<|end|>"]
        found += named.values()
    return list(dict.fromkeys(token for token in found if token is not None))
