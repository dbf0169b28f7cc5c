"""Parser of lists of messages and of tools, in the forms of OpenAI, Anthropic, Gemini, ShareGPT and those like them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron.core.json_text import parse_json
from megatron.data.errors import DataError
from megatron.finetuning.content_blocks import without_blocks
from megatron.finetuning.conversations import ANSWERING, REASONING_KEYS, Message, ToolCall

ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value", "parts")
WEIGHT_KEYS = ("weight", "train", "training")
UNSUPPORTED_KEYS = ("train_detail", "training_detail")
ALIASES = {
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), ANSWERING),
    **dict.fromkeys(("function", "observation", "function_response", "ipython"), "tool"),
}
CALLING = "function_call"


def parse_messages(given: Any, key: str, are_trained: bool = True) -> list[Message]:
    """Parse the turns of a record's `key`. DataError, naming the turn, if one is malformed."""
    if not isinstance(given, list) or not all(isinstance(message, Mapping) for message in given):
        raise DataError(f'"{key}" is no list of objects; give each turn as {{"role": ..., "content": ...}}.')
    messages: list[Message] = []
    for place, message in enumerate(given, start=1):
        try:
            turns = without_blocks({k: v for k, v in message.items() if v is not None})
            messages.extend(_parse_message(turn, are_trained) for turn in turns)
        except DataError as error:
            raise DataError(f"turn {place}: {error}") from error
    return messages


def parse_tools(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Parse "tools", or "functions" in the older form: a list, or its JSON text."""
    given = record.get("tools") or record.get("functions") or []
    tools = _from_text(given, "tools") if isinstance(given, str) and given.strip() else given or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f'"tools" is {shown(given)}, not a list of objects; give a JSON schema for each function.')
    return tuple(tool if "function" in tool else {"type": "function", "function": _function(tool)} for tool in tools)


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a function with its schema under OpenAI's name; Anthropic's is "input_schema". DataError: no name."""
    if not isinstance(tool.get("name"), str):
        raise DataError(f"a tool is {shown(tool)}, without a name; give each function with its name and parameters.")
    return {"parameters" if key == "input_schema" else key: value for key, value in tool.items()}


def text_of(content: Any, key: str) -> str:
    """Return a text, or text parts joined, which may be under "parts". DataError for anything else."""
    if isinstance(content, Mapping):
        content = content.get("parts")
    if isinstance(content, list):
        return "".join(map(_text_part, content))
    return _text_of({key: content}, (key,))


def shown(value: Any) -> str:
    """Return the beginning of a value for a message."""
    return json.dumps(value, default=str)[:40]


def _parse_message(message: Mapping[str, Any], are_trained: bool) -> Message:
    role = _text_of(message, ROLE_KEYS)
    if role == CALLING:
        calls = _from_text(_text_of(message, CONTENT_KEYS), "the function call")
        return Message(
            ANSWERING, None, tool_calls=_calls(calls), is_trained=_is_trained(message, ANSWERING, are_trained)
        )
    role = ALIASES.get(role, role)
    calls = message.get("tool_calls") or message.get(CALLING) or []
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), "")
    if not isinstance(reasoning, str):
        raise DataError(f"its reasoning is {shown(reasoning)}, not text; give a string.")
    tool_calls = _calls(_from_text(calls, "tool_calls") if isinstance(calls, str) else calls)
    return Message(
        role,
        _content(message, is_optional=bool(tool_calls or reasoning.strip())),
        reasoning,
        tool_calls,
        _optional_text(message, "name"),
        _optional_text(message, "tool_call_id"),
        _is_trained(message, role, are_trained),
    )


def _content(message: Mapping[str, Any], is_optional: bool) -> str | None:
    """Return the text of a message, whose text parts are joined."""
    key = next((key for key in CONTENT_KEYS if key in message), None)
    if key is None and is_optional:
        return None
    return text_of(message.get(key or CONTENT_KEYS[0]), key or CONTENT_KEYS[0])


def _text_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = _kind_of(part) if isinstance(part, Mapping) else type(part).__name__
    if kind != "text":
        raise DataError(f"a part of type {kind!r}; only parts of type 'text' can be trained: leave it out.")
    if not isinstance(part.get("text"), str):
        raise DataError(f"a part of type 'text' has {shown(part.get('text'))}, not text; give a string.")
    return str(part["text"])


def _kind_of(part: Mapping[str, Any]) -> str:
    """Return the type of a part; Gemini's have none, but one key each, and mark thoughts."""
    keys = [key for key, value in part.items() if value is not None]
    if "type" in keys:
        return str(part["type"])
    return "thought" if part.get("thought") else next((key for key in keys if key != "text"), "text")


def _calls(given: Any) -> tuple[ToolCall, ...]:
    calls = [given] if isinstance(given, Mapping) else given
    if not isinstance(calls, list):
        raise DataError(f"its tool calls are {shown(given)}, not a list of objects; give each with name and arguments.")
    return tuple(map(_call, calls))


def _call(given: Any) -> ToolCall:
    function = given.get("function", given) if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"a tool call is {shown(given)}, without a name; give its name and its arguments.")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            parsed = parse_json(arguments)
        except ValueError:
            parsed = None
        arguments = parsed if isinstance(parsed, Mapping) else arguments
    if not isinstance(arguments, Mapping | str):
        raise DataError(f"the tool call {function['name']!r} has arguments {shown(arguments)}; give a JSON object.")
    identity = given.get("id")
    return ToolCall(function["name"], arguments, identity if isinstance(identity, str) else None)


def _is_trained(message: Mapping[str, Any], role: str, are_trained: bool) -> bool:
    """Return whether the weight of a message is 1; the default is `are_trained`."""
    unsupported = next((key for key in UNSUPPORTED_KEYS if message.get(key)), None)
    if unsupported is not None:
        raise DataError(f"{unsupported!r} weighs parts of a text, which is not supported; give the text as segments.")
    key = next((key for key in WEIGHT_KEYS if key in message), None)
    if key is None:
        return are_trained
    weight = message[key]
    if not isinstance(weight, int | float) or weight not in (0, 1):
        raise DataError(f"{key!r} is {shown(weight)}; give 1 or true to train the turn, 0 or false to leave it out.")
    if key != "weight" and weight and role != ANSWERING:
        raise DataError(f"{key!r} is set on a turn of the {role}, but only the assistant's turns count; remove it.")
    return bool(weight) and are_trained


def _text_of(message: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    key = next((key for key in keys if key in message), keys[0])
    value = message.get(key)
    if not isinstance(value, str):
        raise DataError(f"{key!r} is {shown(value)}, not text; give a string.")
    return value


def _optional_text(message: Mapping[str, Any], key: str) -> str | None:
    value = message.get(key)
    return value if isinstance(value, str) else None


def _from_text(text: Any, what: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{what} is {shown(text)}, not JSON ({error}); repair it.") from error
