"""The logger named "megatron": rank 0 writes to stdout, other ranks write only warnings and errors, to stderr."""

import logging
import sys

LOGGER_NAME = "megatron"


class _PlainInfoFormatter(logging.Formatter):
    """Leaves INFO lines unchanged and prefixes all others with the level, and with the rank if there is one."""

    def __init__(self, prefix: str = "") -> None:
        super().__init__("%(message)s")
        self._prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return message if record.levelno == logging.INFO else f"{self._prefix}{record.levelname}: {message}"


def configure_logging(rank: int) -> logging.Logger:
    """Configure the "megatron" logger for this rank and return it.

    Rank 0 writes INFO and above to stdout, other ranks write WARNING and above to stderr. A second call replaces the
    configuration of the first.
    """
    is_first = rank == 0
    handler = logging.StreamHandler(sys.stdout if is_first else sys.stderr)
    handler.setFormatter(_PlainInfoFormatter("" if is_first else f"[rank {rank}] "))
    logger = logging.getLogger(LOGGER_NAME)
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if is_first else logging.WARNING)
    logger.propagate = False
    return logger
