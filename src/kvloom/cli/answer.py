"""Answers on the terminal: text as it comes, one JSON object, and the figures of a request."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kvloom.errors import RequestFailedError

if TYPE_CHECKING:
    from kvloom.engine.output import RequestOutput


@dataclasses.dataclass
class Answer:
    """One streamed request: its newest output, and the times (seconds) of its start, first token and newest output."""

    started: float = dataclasses.field(default_factory=time.perf_counter)
    first: float | None = None
    last: float = 0.0
    output: "RequestOutput | None" = None

    def follow(self, outputs: "Iterator[RequestOutput]") -> "Generator[RequestOutput, None, None]":
        """Yield each of `outputs`, keeping the newest and the times of the first and the last token.

        Raises `RequestFailedError` after the last when the request has ended with an error.
        """
        for output in outputs:
            self.output = output
            self.last = time.perf_counter()
            if self.first is None and any(completion.token_ids for completion in output.outputs):
                self.first = self.last
            yield output
            if output.error is not None:
                raise RequestFailedError(output.error)

    @property
    def text(self) -> str:
        """Text of the first completion so far."""
        return self.output.outputs[0].text if self.output else ""

    def figures(self) -> dict[str, Any]:
        """Return what the request cost: tokens, seconds, and bytes of KV cache."""
        if self.output is None or self.first is None:
            return {}
        tokens = [len(completion.token_ids) for completion in self.output.outputs]
        figures: dict[str, Any] = {
            "prompt_tokens": len(self.output.prompt_token_ids),
            "completion_tokens": sum(tokens),
            "finish_reason": ", ".join(str(completion.finish_reason) for completion in self.output.outputs),
            "time_to_first_token_s": round(self.first - self.started, 3),
        }
        if max(tokens) > 1 and self.last > self.first:
            figures["decode_tokens_per_s"] = round((sum(tokens) - len(tokens)) / (self.last - self.first), 1)
        return figures | {f"kv_{name}": value for name, value in dataclasses.asdict(self.output.kv).items()}


def write(text: str) -> None:
    """Write `text` to standard output now."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_growing(outputs: "Iterator[RequestOutput]") -> None:
    """Write the first completion's text as it grows, then a line end; nothing if the request fails before any text."""
    shown = 0
    try:
        for output in outputs:
            text = output.outputs[0].text
            if len(text) > shown:
                write(text[shown:])
                shown = len(text)
    except BaseException:
        if shown:
            write("\n")
        raise
    write("\n")


def write_completions(output: "RequestOutput") -> None:
    """Write every completion of `output` under a heading."""
    for completion in output.outputs:
        write(f"--- {completion.index + 1} of {len(output.outputs)} ({completion.finish_reason})\n{completion.text}\n")


def write_json(value: Any) -> None:
    """Write `value` (dataclasses, mappings, sequences, numbers) as one line of JSON; infinities and NaN are null."""
    write(json.dumps(_plain(value), ensure_ascii=False, allow_nan=False) + "\n")


def write_figures(figures: Mapping[str, Any]) -> None:
    """Write one `name: value` a line to standard error."""
    for name, value in figures.items():
        sys.stderr.write(f"{name}: {value}\n")
    sys.stderr.flush()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
