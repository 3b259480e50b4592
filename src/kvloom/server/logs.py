"""Logs: one JSON object a line on standard error; output of libraries there is wrapped."""

import contextlib
import io
import json
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO


class JSONFormatter(logging.Formatter):
    """Writes a record as one line of JSON: time (UTC), level, logger, message, and the record's `facts`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; line breaks in what clients sent are escaped by JSON itself."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class StderrLines(io.TextIOBase):
    """A text stream that logs every line written to it, under the name `stderr`; a thread may write parts of a line.

    Carriage returns end a line too: progress bars use them.
    """

    def __init__(self) -> None:
        self._logger = logging.getLogger("stderr")
        self._held = ""

    def write(self, text: str) -> int:
        """Log the lines that `text` completes, and hold the rest."""
        *lines, self._held = (self._held + text).replace("\r", "\n").split("\n")
        for line in filter(str.strip, lines):
            self._logger.warning("%s", line.rstrip())
        return len(text)

    def flush(self) -> None:
        """Log a line that has no end yet."""
        if self._held.strip():
            self.write("\n")

    def writable(self) -> bool:
        """True."""
        return True


def configure_logs(stream: TextIO | None = None) -> None:
    """Send all records to `stream` (standard error) as JSON lines; replaces handlers.

    Of libraries only warnings and errors are written, Python's own warnings among them.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JSONFormatter())
    for name, level in (("kvloom", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level)
    logging.getLogger().handlers = [handler]
    logging.captureWarnings(True)


@contextlib.contextmanager
def wrapped_stderr() -> Iterator[None]:
    """Turn lines that Python code writes to standard error into log lines; `configure_logs` must have been called.

    Output of compiled libraries that bypasses Python, such as the message of an abort, is not changed, so that it is
    never lost.
    """
    before = sys.stderr
    lines = StderrLines()
    sys.stderr = lines
    try:
        yield
    finally:
        sys.stderr = before
        lines.flush()
