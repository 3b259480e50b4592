"""`kvloom generate [MODEL] PROMPT`: one prompt, its answer on standard output as it comes."""

from typing import Any

import click

from kvloom.cli.answer import Answer, write_completions, write_figures, write_growing, write_json
from kvloom.cli.command import Command, Flag
from kvloom.cli.engineflags import ENGINE_FLAGS, MODEL_FLAG, engine_arguments
from kvloom.cli.loading import load_llm
from kvloom.cli.plugin import PLUGIN_FLAG
from kvloom.cli.prompt import choose_model, split_arguments, templated
from kvloom.cli.samplingflags import COMPLETION_FLAGS, SAMPLING_FLAGS, sampling_params
from kvloom.cli.values import Text


def run(
    arguments: tuple[str, ...], model: str, raw: bool, system: str | None, as_json: bool, stats: bool, **values: Any
) -> None:
    """Answer the prompt; raises `KvloomError` before the model is loaded wherever the flags alone are wrong."""
    argument, prompt = split_arguments(arguments)
    name = choose_model(click.get_current_context(), argument, model)
    sampling = sampling_params(values)
    if (sampling.logprobs, sampling.prompt_logprobs) != (None, None) and not as_json:
        raise click.UsageError("--logprobs and --prompt-logprobs are shown only with --json")
    if raw and system is not None:
        raise click.UsageError("--system is a message of the chat template, which --raw skips")

    llm = load_llm(name, populate=False, **engine_arguments(values))  # prompts are short: a fast start counts more
    answer = Answer()
    outputs = answer.follow(llm.stream(_request(llm, prompt, raw, system), sampling))
    if as_json or sampling.n > 1:
        for _ in outputs:
            pass
    else:
        write_growing(outputs)
    if answer.output is None:
        return
    figures = answer.figures() | {f"engine_{key}": value for key, value in llm.stats().items()} if stats else {}
    if as_json:
        write_json(answer.output.to_dict() | ({"stats": figures} if stats else {}))
    elif sampling.n > 1:
        write_completions(answer.output)
    if stats and not as_json:
        write_figures(figures)


def _request(llm: Any, prompt: str, raw: bool, system: str | None) -> str | dict[str, Any]:
    """Return the prompt as a message of the chat template when the model has one and `raw` is not set."""
    if raw or not (llm.tokenizer.has_chat_template or system is not None):
        return prompt
    messages = [] if system is None else [{"role": "system", "content": system}]
    return templated(llm, [*messages, {"role": "user", "content": prompt}])


generate = Command(
    "generate",
    callback=run,
    short_help="Answer one prompt.",
    help="""Answer PROMPT with MODEL (default: the catalogue's smollm2, fetched on first use) and print the text as it
    comes. One argument is the prompt, two are the model and the prompt. The prompt `-`, or no argument when input is
    piped, reads it from standard input.

    If the model has a chat template, PROMPT is sent through it as the user's message; --raw continues PROMPT as
    plain text instead. A model without a template always continues plain text.""",
    params=[
        click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED, metavar="[MODEL] PROMPT"),
        *SAMPLING_FLAGS,
        *COMPLETION_FLAGS,
        MODEL_FLAG,
        PLUGIN_FLAG,
        *ENGINE_FLAGS,
        Flag(["--raw"], section="Prompt and output", is_flag=True, help="Skip the chat template."),
        Flag(["--system"], section="Prompt and output", type=Text(), help="System message before the prompt."),
        Flag(
            ["--json", "as_json"],
            section="Prompt and output",
            is_flag=True,
            help="Print the whole RequestOutput, with the figures of its KV cache, as one line of JSON.",
        ),
        Flag(
            ["--stats"],
            section="Prompt and output",
            is_flag=True,
            help="Add the figures of the request and the engine: on standard error, or inside the JSON.",
        ),
    ],
)
