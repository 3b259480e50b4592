"""The `kvloom` command: its tree of commands, and the conversion of every failure to one line and an exit code.

Exit codes: 0 done; 1 a request that failed; 2 wrong usage or input; 3 to 9 the other deliberate errors
(`kvloom.errors`); 70 a bug of kvloom; 74 the output or a file could not be written or read; 130 interrupted by Ctrl-C;
141 the output was closed.
"""

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import click

import kvloom
from kvloom.cli.bench import bench
from kvloom.cli.chat import chat
from kvloom.cli.collectenv import collect_env
from kvloom.cli.command import Group
from kvloom.cli.generate import generate
from kvloom.cli.measure import measure
from kvloom.cli.methods import methods
from kvloom.cli.plan import plan
from kvloom.cli.pull import pull
from kvloom.cli.serve import serve
from kvloom.cli.variables import misspelt_variables
from kvloom.errors import KvloomError

BUG, UNWRITTEN, INTERRUPTED, BROKEN_PIPE = 70, 74, 130, 141

COMPLETE = "_KVLOOM_COMPLETE"
"""Environment variable of click's completion: `bash_source`, `zsh_source` or `fish_source` print a shell's script."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a file or of standard output that cannot grow; the error of a write does not name the file."""

cli = Group(
    "kvloom",
    help="Plan, measure and serve the KV cache of large language models.",
    commands=[plan, measure, serve, generate, chat, bench, methods, pull, collect_env],
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=lambda ctx, param, asked: asked and _print_version(ctx),
            help="Print the version and exit.",
        )
    ],
    epilog="KVLOOM_DEBUG=1 shows the traceback of an error. Completion in bash: "
    'eval "$(_KVLOOM_COMPLETE=bash_source kvloom)"; zsh_source and fish_source are for other shells.',
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `kvloom` with `arguments` (the process's own by default) and exit with its status."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run `kvloom` with `arguments` and return its exit code; failures are one line on standard error.

    A shell that completes a command sets `COMPLETE`; its words are answered in place of a run.
    """
    if COMPLETE in os.environ:
        from click.shell_completion import shell_complete

        return shell_complete(cli, {}, "kvloom", COMPLETE, os.environ[COMPLETE])
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: nobody wants it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="replace")
    for warning in misspelt_variables(os.environ, cli):
        sys.stderr.write(f"warning: {warning}\n")
    try:
        with cli.make_context("kvloom", list(arguments)) as context:
            cli.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as finished:
        return finished.exit_code
    except click.exceptions.NoArgsIsHelpError as usage:
        usage.show()
        return usage.exit_code
    except click.ClickException as usage:
        return _fail(usage, usage.format_message().rstrip(".") + _help_hint(usage), usage.exit_code)
    except KvloomError as error:
        return _fail(error, str(error), error.exit_code)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return BROKEN_PIPE
    except OSError as error:
        return _fail_file(error)
    except Exception as bug:
        return _fail_bug(bug)


def _fail_file(error: OSError) -> int:
    """Report a failure of standard output or of a file, which is the system's and not a bug, and return its code."""
    reason = error.strerror or str(error)
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()
    if isinstance(error.filename, str | bytes | os.PathLike):
        return _fail(error, f"cannot use {os.fsdecode(error.filename)}: {reason}; give another path", UNWRITTEN)
    if error.errno in FULL:
        return _fail(error, f"cannot write the output: {reason}; make room, or write elsewhere", UNWRITTEN)
    return _fail_bug(error)


def _discard_output() -> None:
    """Send what standard output still holds nowhere, so that Python's last flush succeeds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail_bug(bug: Exception) -> int:
    hint = "" if _debugging() else " (KVLOOM_DEBUG=1 shows where)"
    return _fail(bug, f"unexpected {type(bug).__name__}: {bug}{hint}", BUG)


def _fail(error: Exception, message: str, code: int) -> int:
    """Report `error` on one line, after its traceback when debugging, and return `code`."""
    if _debugging():
        traceback.print_exception(error)
    with suppress(OSError):  # nobody can be told; the code says it
        sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return code


def _help_hint(usage: click.ClickException) -> str:
    context = usage.ctx if isinstance(usage, click.UsageError) else None
    return f". See `{context.command_path} --help`" if context else ""


def _debugging() -> bool:
    return os.environ.get("KVLOOM_DEBUG", "0") not in ("", "0")


def _print_version(ctx: click.Context) -> NoReturn:
    click.echo(f"kvloom {kvloom.__version__}")
    ctx.exit()
