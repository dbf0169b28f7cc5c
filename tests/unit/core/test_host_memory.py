import pytest

from megatron.core.host_memory import available_host_bytes

MEMINFO = "MemTotal:       2000 kB\nMemFree:         100 kB\nMemAvailable:   1000 kB\nHugePages_Total:       0\n"
FREE = 1000 * 1024


@pytest.fixture
def machine(tmp_path):
    """Writes files of a machine; returns its root."""

    def write(**files):
        for name, text in {"proc/meminfo": MEMINFO, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def test_without_a_control_group_it_is_what_the_kernel_calls_available(machine):
    assert available_host_bytes(machine()) == FREE


@pytest.mark.parametrize(
    "limit, current, inactive, expected",
    [
        ("max", 5000, 0, FREE),
        (900_000, 100_000, 0, 800_000),
        (900_000, 100_000, 40_000, 840_000),
        (10**12, 0, 0, FREE),
    ],
)
def test_a_limit_of_version_2_counts_with_what_is_used_and_reclaimable(machine, limit, current, inactive, expected):
    folder = "sys/fs/cgroup/"
    files = {"memory.max": f"{limit}\n", "memory.current": f"{current}\n", "memory.stat": f"inactive_file {inactive}\n"}
    assert available_host_bytes(machine(**{folder + name: text for name, text in files.items()})) == expected


def test_a_limit_of_version_1_counts_too(machine):
    folder = "sys/fs/cgroup/memory/memory."
    files = {"limit_in_bytes": "500000", "usage_in_bytes": "200000", "stat": "total_inactive_file 1000\nrss 5\n"}
    assert available_host_bytes(machine(**{folder + name: text for name, text in files.items()})) == 301_000


def test_this_machine_has_some():
    assert available_host_bytes() > 2**20
