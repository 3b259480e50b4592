"""`--plugin FILE.py`: cache methods of the user, registered before any policy is read."""

from pathlib import Path

import click

from kvloom.cli.command import Flag


def _load(ctx: click.Context, param: click.Parameter, paths: tuple[Path, ...]) -> None:
    if ctx.resilient_parsing or not paths:  # completion runs no code
        return
    from kvloom.policies.plugins import load_file

    for path in paths:
        load_file(path)


PLUGIN_FLAG = Flag(
    ["--plugin"],
    section="Model and memory",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE.py",
    expose_value=False,
    callback=_load,
    help="Python file that registers cache methods of your own, which policies may then name; it is run. Repeatable.",
)
"""Flag of every command that reads policies; the file is loaded while the flags are parsed."""
