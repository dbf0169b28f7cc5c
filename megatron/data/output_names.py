"""Check of output names before the work begins."""

import os
from pathlib import Path

from megatron.data.errors import DataError

MAX_NAME_BYTES = 255
SHOWN_CHARACTERS = 50


def check_output_name(path: Path, flag: str) -> None:
    """Raise DataError, naming `flag`, if a name within `path` is longer than file systems allow."""
    for name in path.parts:
        num_bytes = len(os.fsencode(name))
        if num_bytes > MAX_NAME_BYTES:
            raise DataError(
                f"{flag} gives a file or folder a name of {num_bytes} bytes, {name[:SHOWN_CHARACTERS]}..; at most "
                f"{MAX_NAME_BYTES} are possible; give a shorter one."
            )
