"""Available host memory: that of the machine, within the limit of the control group (cgroup)."""

from __future__ import annotations

from pathlib import Path

_KIB = 1024

# Versions 2 and 1: folder, file of the limit, file of the usage, and the field of memory.stat that is reclaimable.
_CGROUP_VERSIONS = (
    ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_host_bytes(root: Path = Path("/")) -> int:
    """Return the bytes that can be allocated without swapping: free and reclaimable memory, within the cgroup's limit.

    `root` holds proc/ and sys/.
    """
    free = _fields(root / "proc/meminfo")["MemAvailable:"] * _KIB
    for folder, limit_file, used_file, reclaimable in _CGROUP_VERSIONS:
        limit = _number(root / folder / limit_file)
        if limit is not None:
            used = _number(root / folder / used_file) or 0
            return min(free, limit - used + _fields(root / folder / "memory.stat").get(reclaimable, 0))
    return free


def _number(path: Path) -> int | None:
    """Return the number in a file; None where there is no such file, or no limit ("max")."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _fields(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in map(str.split, lines) if len(words) > 1 and words[1].isdigit()}
