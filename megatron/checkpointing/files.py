"""Small files: written and flushed to disk; JSON is read with a clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.checkpointing.errors import CheckpointError
from megatron.core.atomic_file import flush_to_disk
from megatron.core.json_text import parse_object


def write_text(path: Path, text: str) -> None:
    """Write a file; it is on the disk when this returns."""
    path.write_text(text)
    flush_to_disk(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object; it is on the disk when this returns."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; CheckpointError where there is none."""
    try:
        return parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); point --load at a whole checkpoint.") from error
