"""Reader of files that may be compressed, by file ending: .gz, .zst, anything else unchanged."""

import gzip
import importlib
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, cast

from megatron.data.errors import DataError

PACKED_BYTES_PER_READ = 1 << 9  # four of them may decompress to 128 KiB, all at once
UNPACKED_BYTES_PER_READ = 1 << 16
ZSTANDARD_MAGIC, CHECKSUM_FLAG = b"\x28\xb5\x2f\xfd", 4
LARGEST_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` writes


@contextmanager
def open_unpacked(path: Path) -> Iterator[BinaryIO]:
    """Open the decompressed bytes of a file. DataError, also from reads within the block, if the file is damaged."""
    try:
        with _open(path) as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from error


def has_checksum(path: Path) -> bool:
    """Return whether the first frame of a .zst file declares a checksum of its content; True for other files."""
    with path.open("rb") as file:
        head = file.read(len(ZSTANDARD_MAGIC) + 1)
    return not head.startswith(ZSTANDARD_MAGIC) or bool(head[-1] & CHECKSUM_FLAG)


def unreadable(path: Path, error: object) -> DataError:
    """Return the error for a file that is truncated or not in the format of its file ending."""
    return DataError(f"{path} cannot be read: {error}; give a whole, readable file.")


def require(package: str, purpose: str) -> ModuleType:
    """Import an optional package or one of its modules; the DataError says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise DataError(f"{purpose} needs the package {name}, which is missing; run `pip install {name}`.") from error


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstandardFile(path), UNPACKED_BYTES_PER_READ))
    return path.open("rb")


class _ZstandardFile(io.RawIOBase):
    """The content of all frames of a .zst file; EOFError if it is truncated, which the package's reader ignores."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._zstandard: Any = require("zstandard", f"{path}, a Zstandard file,")
        self._frame: Any = None
        self._packed: bytes = b""
        self._unpacked: bytes | memoryview[int] = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked and self._unpack():
            pass
        num_bytes = min(len(buffer), len(self._unpacked))
        buffer[:num_bytes] = self._unpacked[:num_bytes]
        self._unpacked = self._unpacked[num_bytes:]
        return num_bytes

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _unpack(self) -> bool:
        """Decompress the next part of the file; False at its end."""
        self._packed = self._packed or self._file.read(PACKED_BYTES_PER_READ)
        if not self._packed:
            if self._frame is not None:
                raise EOFError("the file ends within a Zstandard frame")
            return False
        if self._frame is None:
            self._frame = self._zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW_BYTES).decompressobj()
        try:
            self._unpacked = memoryview(self._frame.decompress(self._packed))
        except self._zstandard.ZstdError as error:
            raise OSError(str(error)) from error
        self._packed = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None
        return True
