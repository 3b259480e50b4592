"""Types of flag values: what a string on the command line, in the environment or in a config file means."""

import json
from typing import Any

import click

from kvloom.errors import InvalidInputError
from kvloom.units import parse_bytes, parse_count


class TokenCount(click.ParamType[int | None]):
    """Tokens: `4096`, `4k` (4000), `4K` (4096), and `auto`, which converts to None."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Return the number of tokens, None for `auto`; fails as a usage error."""
        if value == "auto":
            return None
        try:
            return parse_count(value)
        except InvalidInputError as error:
            self.fail(f"{error}, or auto", param, ctx)


class ByteCount(click.ParamType[int]):
    """Bytes: `2147483648`, `2GiB`, `1.5GB`."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes; fails as a usage error."""
        try:
            return parse_bytes(value)
        except InvalidInputError as error:
            self.fail(str(error), param, ctx)


class Text(click.ParamType[str]):
    """Text that may hold blanks: an environment variable is one value, or a JSON list of several."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return `value` unchanged; fails when it is not valid Unicode."""
        return valid_text(str(value), self.name)

    def split_envvar_value(self, rv: str) -> list[str]:
        """Return the values of a repeatable flag that its environment variable gives."""
        if not rv.lstrip().startswith("["):
            return [rv]
        try:
            return [str(item) for item in json.loads(rv)]
        except ValueError as error:
            raise InvalidInputError(f"{rv!r} starts like a JSON list and is none: {error}") from None


class TokenBiases(click.ParamType[dict[int, float]]):
    """A JSON object from token id to bias, e.g. `{"17": -5}`."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[int, float]:
        """Return the biases by token id; fails as a usage error."""
        try:
            items = json.loads(value).items() if isinstance(value, str) else value.items()
            return {int(token): float(bias) for token, bias in items}
        except (ValueError, TypeError, AttributeError):
            self.fail(f"""{value!r} is not a JSON object of numbers by token id, e.g. {{"17": -5}}""", param, ctx)


class JsonObject(click.ParamType[dict[str, Any]]):
    """A JSON object, e.g. `{"rope_scaling": {"rope_type": "linear", "factor": 2}}`."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """Return the object; fails as a usage error."""
        try:
            found = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            found = None
        if not isinstance(found, dict):
            self.fail(f"{value!r} is not a JSON object", param, ctx)
        return found


def valid_text(text: str, what: str) -> str:
    """Return `text`; raises `InvalidInputError` when it came from bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"the {what} is not valid UTF-8 at character {error.start}") from None
    return text
