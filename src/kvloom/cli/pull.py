"""`kvloom pull NAME`: fetches a model of the catalogue into the cache folder, once."""

import click

from kvloom.cli.answer import write
from kvloom.cli.command import Command


def run(name: str) -> None:
    """Fetch `name` and print the path of its file; raises `ModelNotFoundError` and `DownloadError`."""
    from kvloom.models.pull import pull as fetch

    write(f"{fetch(name)}\n")


pull = Command(
    "pull",
    callback=run,
    short_help="Fetch a model of the catalogue.",
    help="""Fetch the model called NAME in the catalogue into the cache folder, check it against its pinned checksum,
    and print where it is. What is there already is not fetched again.""",
    params=[click.Argument(["name"], metavar="NAME")],
)
