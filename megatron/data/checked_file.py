"""Files with a checksum at the end, which detects damage.

The checksum is the CRC-32 of a key and the content, in little-endian order. The key says what the file is for, so an
undamaged file in the place of another is detected too.
"""

import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

CHECKSUM_BYTES = 4


def append_checksum(path: Path, key: str) -> None:
    """Append the checksum to a file that is not empty."""
    checksum = _checksum(np.memmap(path, np.uint8, "r"), key)
    with path.open("ab") as file:
        file.write(checksum)


def is_as_written(path: Path, key: str) -> bool:
    """Return whether a file exists and is as `append_checksum` left it. Reads all of it."""
    if not path.is_file() or path.stat().st_size <= CHECKSUM_BYTES:  # an empty file cannot be mapped
        return False
    content = np.memmap(path, np.uint8, "r")
    return content[-CHECKSUM_BYTES:].tobytes() == _checksum(content[:-CHECKSUM_BYTES], key)


def _checksum(content: npt.NDArray[np.uint8], key: str) -> bytes:
    return zlib.crc32(content.data, zlib.crc32(key.encode())).to_bytes(CHECKSUM_BYTES, "little")
