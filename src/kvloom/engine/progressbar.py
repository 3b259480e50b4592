"""ProgressBar: how many requests of a call are answered, on the terminal."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """A bar on standard error while its context is open; nothing where that is not a terminal."""

    def __init__(self, total: int) -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("requests", total=total, speed="")

    def show(self, completed: int, tokens: int, seconds: float) -> None:
        """Show that `completed` requests are answered, and the speed of `tokens` generated in `seconds`."""
        speed = f"{tokens / seconds:.1f} tok/s" if seconds else ""
        self._progress.update(self._task, completed=completed, speed=speed)

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it is."""
        self._progress.stop()
