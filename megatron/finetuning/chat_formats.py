"""Parser of the chat formats in common use: one JSON object to one conversation.

messages           {"messages": [{"role", "content", "tool_calls", "reasoning_content", "weight", ..}, ..], "tools"},
                   or with Anthropic's blocks as content
contents           {"contents": [{"role": "user" | "model", "parts": [{"text"}]}, ..], "systemInstruction"}, of Gemini
sharegpt           {"conversations": [{"from": "human" | "gpt" | .., "value"}, ..], "system", "tools"}
prompt_completion  {"prompt", "completion" | "response"}, texts or lists of messages
alpaca             {"instruction", "input", "output", "system", "history"}
dolly              {"instruction", "context", "response"}
question_answer    {"question" | "query", "answer" | "response", "system", "history"}
segments           {"segments": [{"text", "label"}, ..]}
tokens             {"input_ids", "labels" | "loss_mask" | "completion_mask" | "assistant_masks"}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron.config.finetuning import ChatFormat
from megatron.data.errors import DataError
from megatron.finetuning.conversations import ANSWERING, Message, Segments, TokenRecord, TrainingRecord, checked
from megatron.finetuning.messages import parse_messages, parse_tools, shown, text_of

IGNORED_LABEL = -100
MASK_KEYS = ("loss_mask", "completion_mask", "assistant_masks", "assistant_tokens_mask")
COMPLETION_KEYS = ("completion", "response")
QUESTION_KEYS, ANSWER_KEYS = ("question", "query"), ("answer", "response")
SYSTEM_KEYS = ("system", "system_prompt", "systemInstruction", "system_instruction")
FORMS = (
    '"messages", "conversations", "contents", "prompt" and "completion" (or "response"), "instruction" and "output" '
    '(or "response"), "question" and "answer", "segments", or "input_ids" and "labels"'
)
KEYS = (
    *("messages", "conversations", "contents", "prompt", *COMPLETION_KEYS, "instruction", "input", "output", "context"),
    *(*QUESTION_KEYS, "answer", "history", *SYSTEM_KEYS, "tools", "functions", "segments"),
    *("input_ids", "labels", *MASK_KEYS),
)
Record = Mapping[str, Any]


def format_of(record: Any) -> ChatFormat:
    """Detect the format of a record by its keys. DataError if it has none of them."""
    if not isinstance(record, Mapping):
        raise DataError(f"a JSON {type(record).__name__}; give an object with {FORMS}.")
    keys = {key for key, value in record.items() if value is not None}
    if "messages" in keys:
        return "messages"
    if "conversations" in keys:
        return "sharegpt"
    if "contents" in keys:
        return "contents"
    if "prompt" in keys and keys & set(COMPLETION_KEYS):
        return "prompt_completion"
    if {"instruction", "output"} <= keys:
        return "alpaca"
    if {"instruction", "response"} <= keys:
        return "dolly"
    if keys & set(QUESTION_KEYS) and keys & set(ANSWER_KEYS):
        return "question_answer"
    if "segments" in keys:
        return "segments"
    if "input_ids" in keys:
        return "tokens"
    raise DataError(f"keys {', '.join(map(str, record)) or 'none'}; give an object with {FORMS}.")


def parse_record(record: Any, chat_format: ChatFormat) -> TrainingRecord:
    """Parse a record of the format; other keys are ignored. DataError if it is not of that format."""
    if not isinstance(record, Mapping):
        raise DataError(f"a JSON {type(record).__name__}; give an object with {FORMS}.")
    return PARSERS[chat_format]({key: value for key, value in record.items() if value is not None})


def _parse_messages(record: Record) -> TrainingRecord:
    return checked(_with_system(record, parse_messages(_given(record, "messages"), "messages")), parse_tools(record))


def _parse_sharegpt(record: Record) -> TrainingRecord:
    messages = parse_messages(_given(record, "conversations"), "conversations")
    return checked(_with_system(record, messages), parse_tools(record))


def _parse_prompt_completion(record: Record) -> TrainingRecord:
    """Parse a prompt and what completes it; answers within the prompt do not count."""
    prompt, key = _given(record, "prompt"), next((key for key in COMPLETION_KEYS if key in record), COMPLETION_KEYS[0])
    if isinstance(prompt, list):
        asked = parse_messages(prompt, "prompt", are_trained=False)
    else:
        asked = [Message("user", _text(record, "prompt"))]
    if isinstance(record.get(key), list):
        answered = parse_messages(record[key], key)
    else:
        answered = [Message(ANSWERING, _text(record, key))]
    return checked(_with_system(record, [*asked, *answered]), parse_tools(record))


def _parse_contents(record: Record) -> TrainingRecord:
    return checked(_with_system(record, parse_messages(_given(record, "contents"), "contents")), parse_tools(record))


def _parse_alpaca(record: Record) -> TrainingRecord:
    return _pairs(record, _joined(record, "instruction", "input"), _text(record, "output"))


def _parse_dolly(record: Record) -> TrainingRecord:
    return _pairs(record, _joined(record, "instruction", "context"), _text(record, "response"))


def _parse_question_answer(record: Record) -> TrainingRecord:
    """Parse a question and its answer; how the text under "context" belongs to the question differs by data set."""
    if record.get("context"):
        raise DataError(
            '"context" beside a question, and no rule where it belongs; write both as the "prompt" of '
            '{"prompt": .., "completion": ..}.'
        )
    question, answer = (next((key for key in keys if key in record), keys[0]) for keys in (QUESTION_KEYS, ANSWER_KEYS))
    return _pairs(record, _text(record, question), _text(record, answer))


def _joined(record: Record, *keys: str) -> str:
    """Join the texts that are there by an empty line."""
    return "\n\n".join(_text(record, key) for key in keys if record.get(key))


def _pairs(record: Record, question: str, answer: str) -> TrainingRecord:
    """Return the conversation of the pairs under "history" and a last one."""
    history = record.get("history", [])
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    ):
        raise DataError(f"'history' is {shown(history)}, not a list of pairs of texts; give [question, answer] each.")
    pairs = [*history, (question, answer)]
    messages = [Message(role, text) for pair in pairs for role, text in zip(("user", ANSWERING), pair, strict=True)]
    return checked(_with_system(record, messages), parse_tools(record))


def _parse_segments(record: Record) -> TrainingRecord:
    given = _given(record, "segments")
    if not isinstance(given, list) or not all(
        isinstance(segment, Mapping)
        and isinstance(segment.get("text"), str)
        and isinstance(segment.get("label"), bool | int)
        for segment in given
    ):
        raise DataError('"segments" is no list of {"text": .., "label": true or false}; give each segment so.')
    return Segments(tuple((segment["text"], bool(segment["label"])) for segment in given))


def _parse_tokens(record: Record) -> TrainingRecord:
    tokens = _numbers(record, "input_ids")
    if "labels" in record:
        key, labels = "labels", _numbers(record, "labels")
        for place, (token, label) in enumerate(zip(tokens, labels, strict=False)):
            if label not in (token, IGNORED_LABEL):
                raise DataError(
                    f"'labels' has {label} at {place}, where 'input_ids' has {token}; a label is its own token, not "
                    f"the next one, or {IGNORED_LABEL} where it does not count."
                )
        mask = [label != IGNORED_LABEL for label in labels]
    else:
        key = next((key for key in MASK_KEYS if key in record), "labels")
        weights = _numbers(record, key)
        if not set(weights) <= {0, 1}:
            raise DataError(f"{key!r} has values other than 0 and 1; give 1 for each token that counts in the loss.")
        mask = [bool(weight) for weight in weights]
    if len(mask) != len(tokens):
        raise DataError(f"{key!r} has {len(mask)} values for {len(tokens)} 'input_ids'; give one for each token.")
    return TokenRecord(tuple(tokens), tuple(mask))


def _with_system(record: Record, messages: list[Message]) -> list[Message]:
    """Put the text of the first system key before the turns."""
    key = next((key for key in SYSTEM_KEYS if record.get(key)), None)
    if key is None:
        return messages
    text = text_of(record[key], key)
    if not messages or messages[0].role != "system":
        return [Message("system", text), *messages]
    if messages[0].content != text:
        raise DataError(f'a system turn, and another text under "{key}"; give one of them.')
    return messages


def _given(record: Record, key: str) -> Any:
    if key not in record:
        raise DataError(f"no key {key!r}, but {', '.join(record) or 'none'}; correct the line or --chat-format.")
    return record[key]


def _text(record: Record, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise DataError(f"{key!r} is {shown(value)}, not text; give a string.")
    return value


def _numbers(record: Record, key: str) -> list[int]:
    value = _given(record, key)
    if not isinstance(value, list) or not all(isinstance(number, int) for number in value):
        raise DataError(f"{key!r} is {shown(value)}, not a list of whole numbers; give one for each token.")
    return value


PARSERS: Mapping[ChatFormat, Callable[[Record], TrainingRecord]] = {
    "messages": _parse_messages,
    "sharegpt": _parse_sharegpt,
    "contents": _parse_contents,
    "prompt_completion": _parse_prompt_completion,
    "alpaca": _parse_alpaca,
    "dolly": _parse_dolly,
    "question_answer": _parse_question_answer,
    "segments": _parse_segments,
    "tokens": _parse_tokens,
}
