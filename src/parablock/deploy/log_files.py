"""The logs of server and sites: a JSON object a line, with rotation."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

from parablock.printable import in_one_line, printable

LOG_BYTES, LOGS = 10_000_000, 5
"""A log is begun anew after so many bytes, and so many are kept."""


class PlainLines(logging.Formatter):
    """Lines for a terminal: the time and the words, on which nothing that another side said acts."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # of `logging`
        """Return the line of a record, below which a traceback may stand."""
        return in_one_line(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        """Return what a record says."""
        return printable(super().format(record))


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": when, "level": record.levelname, "message": record.getMessage()})


def log_to(path: Path) -> logging.Handler:
    """Return a handler that writes a JSON object a line, with rotation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=LOGS, encoding="utf-8")
    handler.setFormatter(_JsonLines())
    return handler
