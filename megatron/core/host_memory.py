"""How much memory of the host is there to be used: the machine's, or what its control group leaves."""

from __future__ import annotations

from pathlib import Path

_KIB = 1024


def available_host_bytes(root: Path = Path("/")) -> int:
    """Bytes that could be allocated now without swapping: free and reclaimable memory, within the cgroup's limit.

    `root` holds proc/ and sys/.
    """
    fields = _fields(root / "proc/meminfo")
    free = fields["MemAvailable:"] * _KIB
    cgroup = root / "sys/fs/cgroup"
    limit = _number(cgroup / "memory.max")  # version 2
    if limit is not None:
        reclaimable = _fields(cgroup / "memory.stat").get("inactive_file", 0)
        return min(free, limit - (_number(cgroup / "memory.current") or 0) + reclaimable)
    limit = _number(cgroup / "memory/memory.limit_in_bytes")  # version 1
    if limit is not None:
        reclaimable = _fields(cgroup / "memory/memory.stat").get("total_inactive_file", 0)
        return min(free, limit - (_number(cgroup / "memory/memory.usage_in_bytes") or 0) + reclaimable)
    return free


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no such file, or no limit ("max")."""
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
