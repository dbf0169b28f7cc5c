"""The error that unusable weights raise, and one line for an error of any kind."""

from __future__ import annotations

import errno
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WeightsError(ValueError):
    """A folder of weights cannot be read or written, or its model is not supported; one line for its user."""


def first_line(error: BaseException) -> str:
    """Describe an error in one line: by the operating system's message, if that is the cause."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return f"{cause.strerror} ({cause.filename})" if cause.filename else cause.strerror
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def raise_if_no_room(error: BaseException, target: Path) -> None:
    """Raise a WeightsError that names `target` if the disk was too full to write a file.

    torch.save replaces the operating system's error with its own.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            raise WeightsError(
                f"{target} cannot be written: {cause.strerror}; nothing is left of it; make room, or name another "
                "folder."
            ) from error
        cause = cause.__cause__ or cause.__context__
