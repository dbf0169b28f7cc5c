"""Conversations: turns with tool calls and reasoning, the tools they may use, and data that is no conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.data.errors import DataError

ANSWERING = "assistant"
ROLES = ("system", "developer", "user", ANSWERING, "tool")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Form:
    """A form of messages on which chat templates differ: what they expect of tool calls."""

    arguments_as_text: bool = False
    empty_content: str | None = ""


FORMS = (Form(), Form(arguments_as_text=True), Form(empty_content=None), Form(True, None))


@dataclass(frozen=True)
class ToolCall:
    """One call of a function; `arguments` is an object, or text that is none."""

    name: str
    arguments: Mapping[str, Any] | str
    id: str | None = None

    def for_template(self, form: Form) -> dict[str, Any]:
        """Return the call in the form of OpenAI, with its arguments as an object or as JSON text."""
        is_object = not isinstance(self.arguments, str)
        arguments = (
            json.dumps(self.arguments, ensure_ascii=False) if form.arguments_as_text and is_object else self.arguments
        )
        call = {"type": "function", "function": {"name": self.name, "arguments": arguments}}
        return {"id": self.id, **call} if self.id is not None else call


@dataclass(frozen=True)
class Message:
    """One turn. `content` is None where an answer consists of tool calls alone and has no text."""

    role: str
    content: str | None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    is_trained: bool = True
    """Whether an answer counts in the loss; other turns never do."""

    @property
    def text(self) -> str:
        """The content without the whitespace around it."""
        return (self.content or "").strip()

    @property
    def is_plain(self) -> bool:
        """Whether the turn is text alone."""
        return not (self.reasoning.strip() or self.tool_calls)

    @property
    def is_learned(self) -> bool:
        """Whether this is an answer that counts in the loss."""
        return self.role == ANSWERING and self.is_trained

    def for_template(self, form: Form) -> dict[str, Any]:
        """Return the message as chat templates take it; templates differ in their name for the reasoning."""
        given: dict[str, Any] = {
            "role": self.role,
            "content": self.content if self.content is not None else form.empty_content,
        }
        if self.reasoning.strip():
            given |= dict.fromkeys(REASONING_KEYS, self.reasoning)
        if self.tool_calls:
            given["tool_calls"] = [call.for_template(form) for call in self.tool_calls]
        optional = {"name": self.name, "tool_call_id": self.tool_call_id}
        return given | {key: value for key, value in optional.items() if value is not None}


@dataclass(frozen=True)
class Conversation:
    """Turns, and the tools that the assistant may call, as JSON schemas."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Segments:
    """Texts without a template, and whether each counts in the loss."""

    texts: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class TokenRecord:
    """Tokens, and whether each counts in the loss."""

    tokens: tuple[int, ...]
    is_answer: tuple[bool, ...]


TrainingRecord = Conversation | Segments | TokenRecord


def checked(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Conversation:
    """Return the conversation. DataError unless its roles are known and it ends with an answer to learn from."""
    for place, message in enumerate(messages, start=1):
        if message.role not in ROLES:
            raise DataError(f"turn {place} has the role {message.role!r}; use one of {', '.join(ROLES)}.")
        if message.role == ANSWERING and message.is_plain and not message.text:
            raise DataError(f"turn {place}, an answer of the assistant, is empty; give its text or remove the line.")
        if message.role != ANSWERING and not message.is_plain:
            raise DataError(
                f"turn {place}, of the {message.role}, has tool calls or reasoning, which only the assistant has; "
                "correct its role."
            )
    if not any(message.role == ANSWERING for message in messages):
        raise DataError("no turn of the assistant, so nothing to learn; add the answer or remove the line.")
    if messages[-1].role != ANSWERING:
        raise DataError(
            f"the last turn is of the {messages[-1].role}, which nobody answers; add the answer or remove the turn."
        )
    if not any(message.is_learned for message in messages):
        raise DataError("no answer has a weight other than 0, so nothing to learn; give one or remove the line.")
    return Conversation(tuple(messages), tuple(tools))
