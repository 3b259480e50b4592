"""`kvloom chat [MODEL]`: a conversation in the terminal, or one message a line from a pipe."""

import sys
from contextlib import closing
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import click

from kvloom.cli.answer import Answer, write, write_figures, write_growing
from kvloom.cli.command import Command, Flag
from kvloom.cli.engineflags import ENGINE_FLAGS, MODEL_FLAG, engine_arguments
from kvloom.cli.interrupt import StopOnInterrupt
from kvloom.cli.loading import load_llm
from kvloom.cli.plugin import PLUGIN_FLAG
from kvloom.cli.prompt import choose_model, templated
from kvloom.cli.samplingflags import SAMPLING_FLAGS, sampling_params
from kvloom.cli.values import Text, valid_text
from kvloom.errors import ChatTemplateError, KvloomError
from kvloom.registry import nearest

if TYPE_CHECKING:
    from kvloom.engine.llm import LLM
    from kvloom.engine.params import SamplingParams

WORDS = ("/exit", "/reset", "/help")
"""Lines that are commands to the program and are not sent to the model."""

HELP = "/reset discards the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"


class Conversation:
    """The messages so far, and the model that answers them; an `interactive` conversation continues after errors."""

    def __init__(
        self, llm: "LLM", sampling: "SamplingParams", system: str | None, interactive: bool, stats: bool
    ) -> None:
        self.llm, self.sampling, self.system = llm, sampling, system
        self.interactive, self.stats = interactive, stats
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Discard every message but the system's."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def take(self, line: str) -> bool:
        """Run one line of input, a command or a message; return False when the conversation is over."""
        word = line.strip()
        if word == "/exit":
            return False
        if word == "/reset":
            self.reset()
        elif word.startswith("/") and " " not in word:
            hint = "" if word == "/help" else f"{word} is not a command{nearest(word, list(WORDS))}. "
            sys.stderr.write(f"{hint}{HELP}\n")
        elif word:
            self.say(valid_text(line, "message"))
        return True

    def say(self, message: str) -> None:
        """Send `message` and write the answer as it comes; Ctrl-C ends the answer and keeps its text so far."""
        self.messages.append({"role": "user", "content": message})
        answer = Answer()
        try:
            outputs = answer.follow(self.llm.stream(templated(self.llm, self.messages), self.sampling))
            if self.interactive:
                with StopOnInterrupt() as stop, closing(outputs):
                    write_growing(takewhile(lambda _: not stop.asked, outputs))
            else:
                write_growing(outputs)
        except KvloomError as error:
            self.messages.pop()
            if not self.interactive:
                raise
            sys.stderr.write(f"error: {error} (/reset starts afresh)\n")
            return
        self.messages.append({"role": "assistant", "content": answer.text})
        if self.stats:
            write_figures(answer.figures())


def run(
    argument: str | None, model: str, system: str | None, chat_template: str | None, stats: bool, **values: Any
) -> None:
    """Hold a conversation until /exit or the end of the input."""
    name = choose_model(click.get_current_context(), argument, model)
    sampling = sampling_params(values)
    interactive = sys.stdin.isatty()

    from kvloom.models.chat_template import read_template

    template = None if chat_template is None else read_template(chat_template)
    llm = load_llm(name, populate=False, **engine_arguments(values))  # prompts are short: a fast start counts more
    if template is not None:
        llm.tokenizer.chat_template = template
    if not llm.tokenizer.has_chat_template:
        raise ChatTemplateError(
            f"{name} has no chat template; use `kvloom generate`, or give one by --chat-template"
        )
    conversation = Conversation(llm, sampling, system, interactive, stats)
    if not interactive:
        for line in sys.stdin:
            if not conversation.take(line.removesuffix("\n")):
                break
        return
    sys.stderr.write(f"{name}; /help lists what can be typed beside messages\n")
    while (line := _ask()) is not None and conversation.take(line):
        pass


def _ask() -> str | None:
    """Return the next line that the user types, with editing and history; None at the end of input (Ctrl-D)."""
    import readline  # noqa: F401  (importing it is what gives input() its line editing)

    while True:
        try:
            return input("> ")
        except KeyboardInterrupt:
            write("\n")
        except EOFError:
            write("\n")
            return None


chat = Command(
    "chat",
    callback=run,
    short_help="Talk with a model.",
    help="""Talk with MODEL (default: the catalogue's smollm2, fetched on first use). /reset discards the conversation,
    /exit or Ctrl-D ends it, Ctrl-C stops the answer and not the program. Piped input is taken as one message a
    line.""",
    params=[
        click.Argument(["argument"], required=False, metavar="[MODEL]"),
        *SAMPLING_FLAGS,
        MODEL_FLAG,
        PLUGIN_FLAG,
        *ENGINE_FLAGS,
        Flag(["--system"], section="Prompt and output", type=Text(), help="System message before the conversation."),
        Flag(
            ["--chat-template"],
            section="Prompt and output",
            type=Text(),
            metavar="FILE|TEXT",
            help="Jinja template of conversations in place of the model's own.",
        ),
        Flag(
            ["--stats"],
            section="Prompt and output",
            is_flag=True,
            help="Print the figures of each answer on standard error.",
        ),
    ],
)
