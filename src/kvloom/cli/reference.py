"""The reference page of the command line, generated from the commands: `python -m kvloom.cli.reference`."""

import sys
from collections.abc import Iterator

import click

from kvloom.cli.command import Flag
from kvloom.cli.main import COMPLETE, cli


def reference() -> str:
    """Return the page as Markdown: each command with its text, and a table of its flags with their variables."""
    return "\n".join(_page()) + "\n"


def _page() -> Iterator[str]:
    yield "# The command line"
    yield ""
    yield "Made by `python -m kvloom.cli.reference`; a test compares it with the commands."
    for name, command in cli.leaves():
        arguments = [param.make_metavar(_context(command)) for param in command.params if _is_argument(param)]
        yield ""
        yield f"## `{' '.join(['kvloom', name, *arguments])}`"
        yield ""
        yield from (" ".join(paragraph.split()) + "\n" for paragraph in (command.help or "").split("\n\n"))
        yield "| flag | environment | default | meaning |"
        yield "|---|---|---|---|"
        for flag in command.flags.values():
            yield f"| {_spelling(flag)} | `{flag.envvar}` | {_default(flag)} | {_meaning(flag)} |"
    yield ""
    yield "## Completion in the shell"
    yield ""
    yield "This line, in `~/.bashrc`, completes commands, flags and their choices:"
    yield ""
    yield f'    eval "$({COMPLETE}=bash_source kvloom)"'
    yield ""
    yield f'In `~/.zshrc`: `eval "$({COMPLETE}=zsh_source kvloom)"`. In `~/.config/fish/completions/kvloom.fish`:'
    yield f"`{COMPLETE}=fish_source kvloom | source`. Bash must be 4.4 or newer."
    yield ""
    yield "## Exit codes"
    yield ""
    yield " ".join((sys.modules["kvloom.cli.main"].__doc__ or "").split("Exit codes:")[1].split())


def _context(command: click.Command) -> click.Context:
    return click.Context(command)


def _is_argument(param: click.Parameter) -> bool:
    return isinstance(param, click.Argument)


def _spelling(flag: Flag) -> str:
    names = ", ".join(f"`{name}`" for name in [*flag.opts, *flag.secondary_opts])
    return names if flag.is_flag else f"{names} {flag.make_metavar(_context(cli))}".replace("|", r"\|")


def _default(flag: Flag) -> str:
    if flag.is_flag:
        return "on" if flag.default is True else "off"
    shown = flag.to_info_dict()["default"]
    return "" if flag.multiple or shown in (None, "") else f"`{shown}`"


def _meaning(flag: Flag) -> str:
    return (flag.help or "").split("  [default")[0].replace("|", r"\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
