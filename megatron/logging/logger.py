"""The logger named "megatron": rank 0 speaks on stdout, the others only when something is wrong, on stderr."""

import logging
import sys

LOGGER_NAME = "megatron"


class _PlainInfoFormatter(logging.Formatter):
    """Leaves ordinary lines as they are and puts the level, and the rank if there is one, before the others."""

    def __init__(self, prefix: str = "") -> None:
        super().__init__("%(message)s")
        self._prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return message if record.levelno == logging.INFO else f"{self._prefix}{record.levelname}: {message}"


def configure_logging(rank: int) -> logging.Logger:
    """Set the "megatron" logger up for this rank and return it.

    Rank 0 writes information and more to stdout, other ranks write warnings and more to stderr. Calling it again
    replaces the earlier set-up.
    """
    is_first = rank == 0
    handler = logging.StreamHandler(sys.stdout if is_first else sys.stderr)
    handler.setFormatter(_PlainInfoFormatter("" if is_first else f"[rank {rank}] "))
    logger = logging.getLogger(LOGGER_NAME)
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if is_first else logging.WARNING)
    logger.propagate = False
    return logger
