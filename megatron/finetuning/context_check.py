"""Check that a chat template writes everything it is given: a mark is added to each part and looked for in the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from megatron.data.errors import DataError
from megatron.finetuning.conversations import ANSWERING, Conversation, Message, ToolCall

FIRST_MARK = 730_511_900  # of digits, which no change of case touches


@dataclass(frozen=True)
class MarkedConversation:
    """A conversation with a mark in the turns that are no answers, in the tools and in the tool calls."""

    conversation: Conversation
    marks: Mapping[str, str]
    """Names what each mark is in."""

    has_calls: bool

    def check(self, text: str) -> None:
        """Raise DataError unless the text, in which the template wrote this conversation, has every mark."""
        for mark, part in self.marks.items():
            if mark not in text:
                raise DataError(f"the chat template leaves out {part}; remove that or give another --chat-template.")
            if f"'{mark}': " in text:
                raise DataError(f"the chat template writes {part} as Python and not as JSON; give another.")


@dataclass(frozen=True)
class _Marks:
    """Marks handed out so far, each with the name of its part."""

    prefix: str
    named: dict[str, str]

    def new(self, part: str) -> str:
        mark = f"{self.prefix}{len(self.named):06}"
        self.named[mark] = part
        return mark


def mark_context(conversation: Conversation) -> MarkedConversation:
    """Add the marks."""
    given = repr(conversation)
    marks = _Marks(next(mark for number in count() if (mark := f"{FIRST_MARK + number}") not in given), {})
    messages = tuple(
        _mark_answer(message, place, marks) if message.role == ANSWERING else _mark_turn(message, place, marks)
        for place, message in enumerate(conversation.messages, start=1)
    )
    tools = tuple(_mark_tool(tool, marks) for tool in conversation.tools)
    has_calls = any(message.tool_calls for message in messages)
    return MarkedConversation(Conversation(messages, tools), marks.named, has_calls)


def _mark_turn(message: Message, place: int, marks: _Marks) -> Message:
    if not message.text:
        return message
    return replace(message, content=f"{message.content}{marks.new(f'turn {place}, of the {message.role}')}")


def _mark_answer(message: Message, place: int, marks: _Marks) -> Message:
    return replace(message, tool_calls=tuple(_mark_call(call, place, marks) for call in message.tool_calls))


def _mark_call(call: ToolCall, place: int, marks: _Marks) -> ToolCall:
    name = f"{call.name}{marks.new(f'the name of the tool call in turn {place}')}"
    mark = marks.new(f"the arguments of the tool call in turn {place}")
    if isinstance(call.arguments, str):
        return replace(call, name=name, arguments=f"{call.arguments}{mark}")
    return replace(call, name=name, arguments={**call.arguments, mark: mark})


def _mark_tool(tool: Mapping[str, Any], marks: _Marks) -> Mapping[str, Any]:
    function = tool.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return tool
    return {**tool, "function": {**function, "name": f"{function['name']}{marks.new('the tools')}"}}
