"""Files of a rank's chunks on disk: one per folder, without a name, striped, and read and written past the page cache.

A file has no name from the start (O_TMPFILE), or loses it at once: nothing is left of it when the process ends, however
it ends, and two runs in one folder never meet. Its space is reserved at the start, so that a full disk is found then.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron.fpdt.address_space import ALIGNMENT

FLAG = "--ds-sequence-parallel-fpdt-disk"
STRIPE_BYTES = 4 * 2**20  # large enough for the full rate of a disk, small enough for all threads to be busy
_IN_MEMORY = ("tmpfs", "ramfs", "hugetlbfs")
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT, errno.ENOSYS)
_REMEDIES = {
    errno.ENOSPC: f"free space there, name another folder, or lower {FLAG}-memory",
    errno.EDQUOT: f"raise the quota, name another folder, or lower {FLAG}-memory",
    errno.EIO: "the disk fails or was unplugged: see dmesg, and resume from the last checkpoint with another folder",
}

# preadv or pwritev
_Transfer = Callable[[int, list[memoryview], int], int]


class DiskError(Exception):
    """A folder, its file system or its disk cannot do what the run needs."""


def disk_error(doing: str, folder: str, error: OSError) -> DiskError:
    """Describe what failed, where, why and what to do."""
    code = errno.errorcode.get(error.errno or 0, "unknown error")
    remedy = _REMEDIES.get(error.errno or 0, f"name a folder for {FLAG} that this user can write to")
    return DiskError(f"{FLAG} ({folder}): {doing} failed with {code} ({os.strerror(error.errno or 0)}); {remedy}")


def check_folder(folder: str) -> None:
    """Raise DiskError unless chunks can be stored in the folder."""
    path = Path(folder)
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise DiskError(f"{FLAG} ({folder}) {what}; name a folder on a local disk, or create it")
    if not os.access(path, os.W_OK | os.X_OK):
        raise DiskError(f"{FLAG} ({folder}) cannot be written by this user; name another, or change its permissions")
    kind = file_system_of(path)
    if kind in _IN_MEMORY:
        raise DiskError(f"{FLAG} ({folder}) is on {kind}, which is host memory; name a folder on a local disk")


def file_system_of(path: Path) -> str:
    """Return the type of a folder's file system, "" if it is not known."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    mounts = (line.split(" - ") for line in lines)
    return next((types.split()[0] for mount, types in mounts if mount.split()[2] == wanted), "")


class DiskFiles:
    """Bytes from 0 to `num_bytes`, in stripes over the files of several folders."""

    def __init__(self, folders: Sequence[str], num_bytes: int) -> None:
        """Reserve the space.

        Raises:
            DiskError: a file cannot be created, or there is too little space.
        """
        stripes = -(-num_bytes // STRIPE_BYTES)
        self.warnings: list[str] = []
        self._folders = tuple(folders)
        self._files: list[tuple[int, int]] = []  # descriptors for direct and for buffered access
        weakref.finalize(self, _close, self._files)
        for folder in folders:
            try:
                self._files.append(self._open(folder))
                self._reserve(folder, self._files[-1][1], -(-stripes // len(folders)) * STRIPE_BYTES)
            except OSError as error:
                raise disk_error(f"reserving {num_bytes / len(folders) / 2**30:.2f} GiB", folder, error) from error

    @property
    def num_folders(self) -> int:
        return len(self._folders)

    def read(self, place: int, memory: memoryview) -> None:
        """Read bytes of one stripe; DiskError if it fails. Blocks, without the interpreter's lock."""
        self._transfer(os.preadv, "reading", place, memory)

    def write(self, place: int, memory: memoryview) -> None:
        """Write bytes of one stripe; DiskError if it fails. Blocks, without the interpreter's lock."""
        self._transfer(os.pwritev, "writing", place, memory)

    def _transfer(self, call: _Transfer, doing: str, place: int, memory: memoryview) -> None:
        stripe, offset = divmod(place, STRIPE_BYTES)
        row, column = divmod(stripe, len(self._files))
        direct, buffered = self._files[column]
        # The end of a tensor whose size is no multiple of a disk's sectors goes through the page cache.
        is_aligned = place % ALIGNMENT == 0 and len(memory) % ALIGNMENT == 0
        done = 0
        while done < len(memory):
            try:
                file = direct if is_aligned else buffered
                moved = call(file, [memory[done:]], row * STRIPE_BYTES + offset + done)
            except OSError as error:
                raise disk_error(f"{doing} {len(memory)} bytes", self._folders[column], error) from error
            if moved == 0:
                ended = OSError(errno.EIO, "end of file")
                raise disk_error(f"{doing} {len(memory)} bytes", self._folders[column], ended)
            done += moved
            is_aligned = is_aligned and moved % ALIGNMENT == 0

    def _open(self, folder: str) -> tuple[int, int]:
        buffered = _open_without_name(folder)
        try:
            # Another description of the same file, as the two differ in their flags.
            return os.open(f"/proc/self/fd/{buffered}", os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT), buffered
        except OSError:
            self.warnings.append(
                f"{FLAG} ({folder}): its file system does not support O_DIRECT, so chunks go through the page cache, "
                "which is slower and uses host memory"
            )
            return buffered, buffered

    def _reserve(self, folder: str, file: int, num_bytes: int) -> None:
        code = _allocate(file, num_bytes)
        if code == 0:
            return
        if code not in _UNSUPPORTED:
            raise OSError(code, os.strerror(code))
        os.ftruncate(file, num_bytes)
        self.warnings.append(
            f"{FLAG} ({folder}): its file system cannot reserve space, so a full disk is not found until it is written"
        )


def _allocate(file: int, num_bytes: int) -> int:
    """Reserve the space of a file; return the error, or 0.

    Not posix_fallocate, which writes to every block where the file system cannot reserve.
    """
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return ctypes.get_errno() if fallocate(file, 0, 0, max(num_bytes, STRIPE_BYTES)) else 0


def _open_without_name(folder: str) -> int:
    """Open a new file that only its owner may read and that ends with the process."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, stat.S_IRUSR | stat.S_IWUSR)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    file, name = tempfile.mkstemp(prefix=".chunks-", dir=folder)
    os.unlink(name)
    return file


def _close(files: list[tuple[int, int]]) -> None:
    for file in {each for pair in files for each in pair}:
        os.close(file)
