"""Prompts: the forms in which callers of `LLM` give them, read to token ids and options."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from kvloom.errors import InvalidInputError
from kvloom.models.tokenizer import Tokenizer
from kvloom.policies.reading import read_policy

Prompt = str | Mapping[str, Any] | Seq[int]
"""Text, a list of token ids, or {"prompt": text} / {"prompt_token_ids": ids} with optional keys.

The keys are "cache_salt", "priority" (lower is earlier), "kv_policy" and "forced_token_ids"."""

_PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt", "priority", "forced_token_ids", "kv_policy"}


def several(prompts: Any) -> list[Any]:
    """Return a list of prompts; text, a dict and a list of token ids are one prompt each."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Seq) or isinstance(prompts, bytes | bytearray):
        raise InvalidInputError(f"prompts are text, token ids, dicts or a list of these, not {type(prompts).__name__}")
    return [prompts] if len(prompts) and isinstance(prompts[0], int) else list(prompts)


def read_prompt(prompt: Prompt, tokenizer: Tokenizer) -> tuple[list[int], dict[str, Any]]:
    """Return the token ids of a prompt and its options, the text among them."""
    options: dict[str, Any] = {}
    text: str | None = None
    if isinstance(prompt, str):
        text, ids = prompt, tokenizer.encode(prompt)
    elif isinstance(prompt, Mapping):
        unknown = set(prompt) - _PROMPT_KEYS
        if unknown or ("prompt" in prompt) == ("prompt_token_ids" in prompt):
            raise InvalidInputError(
                f"a prompt has either 'prompt' or 'prompt_token_ids', and optional keys among "
                f"{sorted(_PROMPT_KEYS - {'prompt', 'prompt_token_ids'})}; got {sorted(prompt)}"
            )
        if "prompt" in prompt:
            text = prompt["prompt"]
            ids = tokenizer.encode(prompt["prompt"])
        else:
            ids = _token_ids(prompt["prompt_token_ids"])
        options = {k: v for k, v in prompt.items() if k not in ("prompt", "prompt_token_ids")}
        if options.get("kv_policy") is not None:
            options["kv_policy"] = read_policy(options["kv_policy"])
    else:
        ids = _token_ids(prompt)
    return ids, {"prompt": text, **options}


def _token_ids(value: Any) -> list[int]:
    """Return a prompt given as token ids; the engine checks each of them."""
    if not isinstance(value, Seq) or isinstance(value, str | bytes | bytearray):
        raise InvalidInputError(
            f"a prompt is text, a list of token ids or a dict with 'prompt' or 'prompt_token_ids', "
            f"not {type(value).__name__}"
        )
    return list(value)
