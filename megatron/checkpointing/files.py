"""Small JSON files: written and flushed to disk, and read with a clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.checkpointing.errors import CheckpointError
from megatron.core.atomic_file import flush_to_disk
from megatron.core.json_text import parse_object


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file; it is on the disk when this returns."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    flush_to_disk(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; CheckpointError where there is none."""
    try:
        return parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); point --load at a whole checkpoint.") from error
