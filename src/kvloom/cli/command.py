"""Command, Group and Flag: click's, with an environment variable per flag, `--config`, and sections in `--help`."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from kvloom.cli.configfile import read_config
from kvloom.cli.foreign import foreign_flag


class Flag(click.Option):
    """An option that KVLOOM_<FLAG> sets too, listed under `section` in the help of its command."""

    def __init__(self, declarations: Iterable[str], *, section: str = "Options", **attributes: Any) -> None:
        super().__init__(list(declarations), **attributes)
        self.section = section
        self.envvar = "KVLOOM_" + self.flag.upper().replace("-", "_")

    @property
    def flag(self) -> str:
        """Long name without the dashes in front: `max-model-len`."""
        return next(name for name in self.opts if name.startswith("--")).removeprefix("--")

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """Return the name of this flag in error messages, with the source of its value if not the command line."""
        source = ctx.get_parameter_source(str(self.name)) if ctx is not None else None
        origin = {
            ParameterSource.ENVIRONMENT: f" (from {self.envvar})",
            ParameterSource.DEFAULT_MAP: " (from --config)",
        }
        return f"'--{self.flag}'{origin.get(source, '') if source is not None else ''}"


class Command(click.Command):
    """A command all of whose options are `Flag`s; it reads `--config` before any other."""

    def __init__(self, *arguments: Any, **attributes: Any) -> None:
        attributes["context_settings"] = {"show_default": True, "max_content_width": 110}
        super().__init__(*arguments, **attributes)
        self.params.append(
            Flag(
                ["--config"],
                type=click.Path(path_type=Path),
                metavar="FILE.yaml",
                is_eager=True,
                expose_value=False,
                callback=self._load_config,
                help="Read flags from a YAML file; the command line and the environment take precedence.",
            )
        )
        self.epilog = (
            "An environment variable sets each flag: KVLOOM_SOME_FLAG sets --some-flag. "
            "Order of precedence: command line, environment, --config, default."
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse `args`; the error for another server's flag names kvloom's flag for the same purpose."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption:
            reason = foreign_flag(given)
            if reason is None:
                raise
            raise click.UsageError(reason, ctx) from None

    @property
    def flags(self) -> dict[str, Flag]:
        """All flags by long name, in the order of declaration."""
        return {param.flag: param for param in self.params if isinstance(param, Flag)}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections.setdefault(param.section if isinstance(param, Flag) else "Options", []).append(record)
        for title in sorted(sections, key=lambda title: title == "Options"):
            with formatter.section(title):
                formatter.write_dl(sections[title])

    def _load_config(self, ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
        if path is not None:
            options = {name: flag for name, flag in self.flags.items() if name != "config"}
            ctx.default_map = read_config(path, options)


class Group(click.Group):
    """A group of commands; its help lists them in the order of registration."""

    def __init__(self, name: str, commands: Iterable[click.Command], **attributes: Any) -> None:
        super().__init__(name, commands=list(commands), **attributes)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of registration."""
        return list(self.commands)

    def leaves(self) -> Iterator[tuple[str, Command]]:
        """Yield (words after `kvloom`, command) of every command, those of inner groups included."""
        for name, command in self.commands.items():
            if isinstance(command, Group):
                yield from ((f"{name} {rest}", leaf) for rest, leaf in command.leaves())
            elif isinstance(command, Command):
                yield name, command
