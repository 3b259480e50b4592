"""The prompt, from the arguments or from standard input, with or without the model's chat template."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from kvloom.cli.values import valid_text
from kvloom.errors import ChatTemplateError, InvalidInputError

if TYPE_CHECKING:
    from kvloom.engine.llm import LLM


def choose_model(ctx: click.Context, argument: str | None, flag: str) -> str:
    """Return the model's name from the MODEL argument, else from `--model`, its environment variable or the config."""
    if argument is None:
        return flag
    if ctx.get_parameter_source("model") is click.core.ParameterSource.COMMANDLINE and argument != flag:
        raise click.UsageError(f"MODEL is {argument!r} and --model is {flag!r}; give one of them")
    return argument


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, str]:
    """Return (MODEL or None, prompt) of `[MODEL] PROMPT`; `-`, or nothing when input is piped, reads the prompt."""
    if len(arguments) > 2:
        raise click.UsageError(f"expected [MODEL] PROMPT, got {len(arguments)} arguments; put the prompt in quotes")
    if not arguments and sys.stdin.isatty():
        raise click.UsageError("no PROMPT; write it in quotes, or pipe it in")
    model = arguments[0] if len(arguments) == 2 else None
    prompt = arguments[-1] if arguments else "-"
    return model, read_stdin() if prompt == "-" else valid_text(prompt, "prompt")


def read_stdin() -> str:
    """Return all of standard input as UTF-8, without its last line end; raises `InvalidInputError`."""
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"the prompt on standard input is not UTF-8 at byte {error.start}") from None


def templated(llm: "LLM", messages: list[dict[str, str]]) -> dict[str, Any]:
    """Return `messages` as a prompt in the model's own chat format; raises `ChatTemplateError` without one."""
    if not llm.tokenizer.has_chat_template:
        raise ChatTemplateError("this model has no chat template; use `kvloom generate`, which then takes plain text")
    return {"prompt_token_ids": llm.tokenizer.encode_chat(messages)}
