"""Conversations from lines of JSON, in the three forms in which they are passed around."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.json_text import parse_json
from megatron.data.errors import DataError

ROLES = ("system", "user", "assistant")
ANSWERING = "assistant"
FORMS = '"messages", "prompt" and "response", or "instruction" and "output"'


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    content: str


Conversation = tuple[Message, ...]


def read_conversations(path: Path) -> Iterator[tuple[int, Conversation]]:
    """Yield the number of each line, from 1, and its conversation; empty lines are passed over.

    Raises DataError, naming file and line, where a line is no conversation that ends with an answer.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse(line, f"{path}, line {number}")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; give a readable file of JSON lines.") from error


def _parse(line: bytes, where: str) -> Conversation:
    try:
        return parse_conversation(parse_json(line.decode("utf-8-sig")))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); every line must be one JSON object; repair the line.") from error


def parse_conversation(record: Any) -> Conversation:
    """The turns of {"messages": [{"role", "content"}, ..]}, {"prompt", "response"} or Alpaca's {"instruction", "input",
    "output"}, whose input may be absent and comes below the instruction. DataError if it is none of them."""
    if not isinstance(record, dict):
        raise DataError(f"a JSON {type(record).__name__}; give an object with {FORMS}.")
    if "messages" in record:
        return _checked(_messages(record["messages"]))
    if {"prompt", "response"} <= record.keys():
        return _checked((_turn("user", record, "prompt"), _turn(ANSWERING, record, "response")))
    if {"instruction", "output"} <= record.keys():
        question = "\n\n".join(_text(record, key) for key in ("instruction", "input") if record.get(key))
        return _checked((Message("user", question), _turn(ANSWERING, record, "output")))
    raise DataError(f"keys {', '.join(record) or 'none'}; give an object with {FORMS}.")


def _messages(given: Any) -> Conversation:
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        raise DataError('"messages" is no list of objects; give each turn as {"role": ..., "content": ...}.')
    return tuple(Message(_text(message, "role"), _text(message, "content")) for message in given)


def _turn(role: str, record: Mapping[str, Any], key: str) -> Message:
    return Message(role, _text(record, key))


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise DataError(f"{key!r} is {json.dumps(value)[:40]}, not text; give a string.")
    return value


def _checked(conversation: Conversation) -> Conversation:
    for place, message in enumerate(conversation, start=1):
        if message.role not in ROLES:
            raise DataError(f"turn {place} has the role {message.role!r}; use one of {', '.join(ROLES)}.")
        if message.role == ANSWERING and not message.content.strip():
            raise DataError(f"turn {place}, an answer of the assistant, is empty; give its text or remove the line.")
    if not any(message.role == ANSWERING for message in conversation):
        raise DataError("no turn of the assistant, so nothing to learn; add the answer or remove the line.")
    if conversation[-1].role != ANSWERING:
        raise DataError(
            f"the last turn is of the {conversation[-1].role}, which nobody answers; add the answer or remove the turn."
        )
    return conversation
