"""Check of the installation: that `megatron` is this program's, and whole.

Megatron-LM and megatron-core are packages named `megatron`, too. In one environment pip unpacks both into the same
folder, where the later one overwrites files of the earlier one. An installation from wheels runs no code of its own, so
the first command is the first that can say so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

DISTRIBUTION = "megatron-ulysses-offload"
WAYS_OUT = (
    "install this program into an environment of its own (python -m venv), or run a checkout of its source there, "
    "which needs no installation: python pretrain_gpt.py"
)


class ForeignMegatron(Exception):
    """Another package named megatron is in the way."""


def check_installation(found: Iterable[Distribution] | None = None, origin: str | None = None) -> None:
    """Raise ForeignMegatron unless `import megatron` gives this program's package, with all files its own.

    `found`: the distributions installed, `origin`: the file that `import megatron` runs; by default those of this
    process.
    """
    expected = Path(__file__).resolve().parents[1] / "megatron" / "__init__.py"
    if origin is None:
        origin = _origin_of_megatron()
    if Path(origin).resolve() != expected:
        raise ForeignMegatron(
            f"`import megatron` finds {origin or 'a folder without __init__.py'} and not {expected}: Megatron-LM or "
            f"megatron-core comes first on Python's path; remove it from PYTHONPATH, {WAYS_OUT}"
        )
    files: dict[str, set[str]] = {}
    for distribution in distributions() if found is None else found:
        files.setdefault(distribution.name, set()).update(_files_of_megatron(distribution))
    own = files.pop(DISTRIBUTION, set())
    for name, others in sorted(files.items()):
        if shared := sorted(own & others):
            raise ForeignMegatron(
                f"{name} is installed in the same environment and also has {shared[0]} (of {len(shared)} such files): "
                f"one of the two has overwritten the other; uninstall both, reinstall {name} if you need it, and "
                f"{WAYS_OUT}"
            )


def _origin_of_megatron() -> str:
    spec = importlib.util.find_spec("megatron")
    return "" if spec is None or spec.origin is None else spec.origin


def _files_of_megatron(distribution: Distribution) -> set[str]:
    """Return the files that an installation has recorded in megatron/."""
    record = distribution.read_text("RECORD") or ""
    return {line.partition(",")[0] for line in record.splitlines() if line.startswith("megatron/")}
