"""Reader of conversations from JSON lines, or one JSON array, in the three common forms."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.json_text import parse_json
from megatron.data.errors import DataError
from megatron.data.json_records import DEFAULT_MAX_DOCUMENT_MB, TooLong, bytes_of, is_array, read_entries, read_lines
from megatron.data.packed_files import open_unpacked

ROLES = ("system", "user", "assistant")
ANSWERING = "assistant"
FORMS = '"messages", "prompt" and "response", or "instruction" and "output"'


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    content: str


Conversation = tuple[Message, ...]


def where(path: Path, number: int) -> str:
    """Name a line, or an entry of a file that is one array, for a message."""
    return f"{path}, {'entry' if is_array(path) else 'line'} {number}"


def read_conversations(
    path: Path, max_document_mb: int = DEFAULT_MAX_DOCUMENT_MB
) -> Iterator[tuple[int, Conversation]]:
    """Yield the number of each line or entry, from 1, and its conversation; empty lines are skipped.

    The file may be compressed (.gz, .zst). Raises DataError, naming file and line, if a line is not a conversation that
    ends with an answer, or has more than `max_document_mb` MiB.
    """
    of_array, max_bytes = is_array(path), bytes_of(max_document_mb)
    with open_unpacked(path) as file:
        records = read_entries(file, max_bytes, path) if of_array else read_lines(file, max_bytes)
        for number, record in enumerate(records, start=1):
            if isinstance(record, TooLong):
                raise record.error(where(path, number))
            if record.strip():
                yield number, _parse(record, path, number)


def _parse(record: bytes, path: Path, number: int) -> Conversation:
    try:
        return parse_conversation(parse_json(record.decode("utf-8-sig")))
    except DataError as error:
        raise DataError(f"{where(path, number)}: {error}") from error
    except ValueError as error:
        raise DataError(
            f"{where(path, number)}: not JSON ({error}); every line, or entry of one array, must be one JSON object; "
            "repair it."
        ) from error


def parse_conversation(record: Any) -> Conversation:
    """Parse the turns of {"messages": [{"role", "content"}, ..]}, {"prompt", "response"} or Alpaca's {"instruction",
    "input", "output"}, whose input is optional and is appended to the instruction. DataError if it is none of them."""
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
