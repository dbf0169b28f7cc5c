"""JSON whose every fault is a ValueError."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value that a JSON text stands for. ValueError if it is none, also where Python cannot follow its nesting."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("brackets are nested too deep") from error
