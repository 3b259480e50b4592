"""Logs: one JSON object a line on standard error, for machines first."""

import json
import logging
import sys
import time
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


def configure_logs(stream: TextIO | None = None) -> None:
    """Send kvloom's and uvicorn's records to `stream` (standard error) as JSON lines; replaces their handlers."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JSONFormatter())
    for name, level in (("kvloom", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level)
