"""JSON parsing that raises ValueError for every kind of invalid text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Parse a JSON text by json.loads with `options`. ValueError if it is invalid or nested too deeply."""
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise ValueError("brackets are nested too deep") from error


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON text whose value is an object.

    ValueError if it holds another value, or a key twice: some readers take the first, some the last.
    """
    content = parse_json(text, object_pairs_hook=_each_key_once)
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__}, and an object is needed")
    return content


def _each_key_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in content if names.count(name) > 1)
        raise ValueError(f"it has the key {twice!r} twice")
    return content
