"""Messages of Anthropic's form, whose content is a list of blocks, in the form of OpenAI.

thinking, text, tool_use       of the assistant: one turn with reasoning, text and tool calls
tool_result, text              of the user: a tool's turn for each result, then the user's
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from megatron.data.errors import DataError

# Kinds in the order in which a turn has them; any other is text.
_ORDER = {"tool_result": 0, "thinking": 0, "tool_use": 2}
_TEXT = 1
_ROLE_OF = {"tool_result": "user", "thinking": "assistant", "tool_use": "assistant"}


def without_blocks(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the messages that one with content blocks stands for; any other message as it is.

    DataError if the blocks are in an order, or of a role, that the other form does not have.
    """
    content = message.get("content")
    blocks = [{k: v for k, v in block.items() if v is not None} for block in _objects(content)]
    if not any(block.get("type") in _ORDER for block in blocks):
        return [message]
    kinds = [str(block.get("type")) for block in blocks]
    for before, after in pairwise(kinds):
        if _ORDER.get(before, _TEXT) > _ORDER.get(after, _TEXT):
            raise DataError(f"a block of type {after!r} after one of type {before!r}; give each its own turn.")
    for kind in kinds:
        if _ROLE_OF.get(kind, message.get("role")) != message.get("role"):
            raise DataError(f"a block of type {kind!r} in a turn of the {message.get('role')}; correct its role.")
    results: list[Mapping[str, Any]] = [_tool_turn(block) for block in blocks if block.get("type") == "tool_result"]
    calls = [_call(block) for block in blocks if block.get("type") == "tool_use"]
    thoughts = [block.get("thinking") for block in blocks if block.get("type") == "thinking"]
    texts = [block for block in blocks if block.get("type") not in _ORDER]
    if results and not texts:
        return results
    others: dict[str, Any] = {"content": texts or None}
    if calls:
        others["tool_calls"] = calls
    if thoughts:
        others["reasoning_content"] = "".join(map(str, thoughts))
    return [*results, {key: value for key, value in (dict(message) | others).items() if value is not None}]


def _objects(content: Any) -> Sequence[Mapping[str, Any]]:
    is_list = isinstance(content, list) and all(isinstance(block, Mapping) for block in content)
    return content if is_list else []


def _tool_turn(block: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": block.get("content", "")}


def _call(block: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": block.get("id"), "function": {"name": block.get("name"), "arguments": block.get("input", {})}}
