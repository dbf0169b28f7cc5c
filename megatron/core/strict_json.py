"""JSON objects in which every key stands once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Return the object that `text` holds.

    Raises:
        ValueError: it is no JSON, another value than an object, nested too deeply to be read, or names a key twice, of
            which readers take the first or the last as they please.
    """
    try:
        content = json.loads(text, object_pairs_hook=_each_key_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
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
