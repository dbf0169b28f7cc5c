"""Files that tell whether they are as they were written: the content is followed by its checksum.

It is the CRC-32 of a key and the content, in little-endian order; the key says what the file is for, so that a whole
file in the place of another is told apart too.
"""

import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

CHECKSUM_BYTES = 4


def append_checksum(path: Path, key: str) -> None:
    """End a file that holds something with its checksum."""
    checksum = _checksum(np.memmap(path, np.uint8, "r"), key)
    with path.open("ab") as file:
        file.write(checksum)


def is_as_written(path: Path, key: str) -> bool:
    """Whether a file is there, and as `append_checksum` left it. Reads all of it."""
    if not path.is_file() or path.stat().st_size <= CHECKSUM_BYTES:  # a file of no bytes cannot be mapped
        return False
    content = np.memmap(path, np.uint8, "r")
    return content[-CHECKSUM_BYTES:].tobytes() == _checksum(content[:-CHECKSUM_BYTES], key)


def _checksum(content: npt.NDArray[np.uint8], key: str) -> bytes:
    return zlib.crc32(content.data, zlib.crc32(key.encode())).to_bytes(CHECKSUM_BYTES, "little")
