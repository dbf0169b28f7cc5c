"""Every chat format: its tokens and mask against texts written by hand, and one clear sentence about what is malformed.

The tokenizer has a token per byte and per special token.
"""

import json
from typing import Any

import pytest

from megatron.data.errors import DataError
from megatron.finetuning.chat_formats import format_of, parse_record
from megatron.finetuning.chat_template import JinjaTemplate, PlainTemplate
from megatron.finetuning.encoding import ConversationEncoder
from megatron.tokenizer.hugging_face import HFTokenizer
from tests.unit.finetuning.conftest import Segments, ids_of, masked

AGENT = (
    "{% if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.reasoning_content %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls %}{{ '<call>' + c.function | tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "sky", "parameters": {"type": "object"}}}
CALLED = '<call>{"name": "sky", "arguments": {"city": "Paris"}}</call>'


def turn(role: str, text: str, counts: bool | None = None) -> Segments:
    is_answer = role == "assistant" if counts is None else counts
    return [(f"<|im_start|>{role}\n", False), (f"{text}<|im_end|>", is_answer), ("\n", False)]


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **others}


def said(*turns: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"from": role, "value": text} for entry in turns for role, text in entry.items()]


CALL = {"id": "c1", "type": "function", "function": {"name": "sky", "arguments": '{"city": "Paris"}'}}
PARIS = [*turn("user", "Where?"), *turn("assistant", "Paris.")]
WEATHER = [
    (f"<|im_start|>system\n{json.dumps([TOOL])}<|im_end|>\n", False),
    *turn("user", "Sky?"), *turn("assistant", CALLED), *turn("tool", "blue"), *turn("assistant", "Blue."),
]  # fmt: skip
THOUGHT = [*turn("user", "Where?"), *turn("assistant", "<think>\nFrance.\n</think>\n\nParis.")]
FIRST_ALONE = [*PARIS, *turn("user", "And?"), *turn("assistant", "Rome.", counts=False)]
LAST_ALONE = [*turn("user", "Where?"), *turn("assistant", "Paris.", counts=False), *turn("user", "And?"),
              *turn("assistant", "Rome.")]  # fmt: skip
TWO = [user("Where?"), assistant("Paris."), user("And?"), assistant("Rome.")]
SYSTEM = turn("system", "Brief.")

FORMATS: dict[str, tuple[str, dict[str, Any], Segments]] = {
    "messages": ("messages", {"messages": [user("Where?"), assistant("Paris.")], "prompt": "x"}, PARIS),
    "tool calls": (
        "messages",
        {"messages": [user("Sky?"), assistant(None, tool_calls=[CALL]),
                      {"role": "tool", "content": "blue", "tool_call_id": "c1"}, assistant("Blue.")], "tools": [TOOL]},
        WEATHER,
    ),
    "older function calls": (
        "messages",
        {"messages": [user("Sky?"), assistant(None, function_call=CALL["function"]),
                      {"role": "function", "name": "sky", "content": "blue"}, assistant("Blue.")],
         "functions": [TOOL["function"]]},
        WEATHER,
    ),
    "content parts": (
        "messages",
        {"messages": [user([{"type": "text", "text": "Whe"}, {"type": "text", "text": "re?"}]),
                      assistant([{"type": "text", "text": "Paris."}])]},
        PARIS,
    ),
    "reasoning_content": (
        "messages", {"messages": [user("Where?"), assistant("Paris.", reasoning_content="France.")]}, THOUGHT,
    ),
    "thinking": ("messages", {"messages": [user("Where?"), assistant("Paris.", thinking="France.")]}, THOUGHT),
    "weight": ("messages", {"messages": [*TWO[:3], TWO[3] | {"weight": 0}]}, FIRST_ALONE),
    "train": ("messages", {"messages": [TWO[0], TWO[1] | {"train": False}, *TWO[2:]]}, LAST_ALONE),
    "sharegpt": ("sharegpt", {"conversations": said({"human": "Where?"}, {"gpt": "Paris."}), "system": "Brief."},
                 [*SYSTEM, *PARIS]),
    "sharegpt with calls": (
        "sharegpt",
        {"conversations": said({"human": "Sky?"},
                               {"function_call": '{"name": "sky", "arguments": {"city": "Paris"}}'},
                               {"observation": "blue"}, {"gpt": "Blue."}), "tools": json.dumps([TOOL])},
        WEATHER,
    ),
    "prompt and completion": ("prompt_completion", {"prompt": "Where?", "completion": "Paris."}, PARIS),
    "prompt and response": ("prompt_completion", {"prompt": "Where?", "response": "Paris."}, PARIS),
    "lists of both": ("prompt_completion", {"prompt": TWO[:3], "completion": TWO[3:]}, LAST_ALONE),
    "alpaca": (
        "alpaca",
        {"instruction": "And", "input": "where?", "output": "Rome.", "system": "Brief.",
         "history": [["Where?", "Paris."]]},
        [*SYSTEM, *PARIS, *turn("user", "And\n\nwhere?"), *turn("assistant", "Rome.")],
    ),
    "dolly": (
        "dolly", {"instruction": "And", "context": "where?", "response": "Rome.", "category": "qa"},
        [*turn("user", "And\n\nwhere?"), *turn("assistant", "Rome.")],
    ),
    "question and answer": (
        "question_answer", {"system_prompt": "Brief.", "question": "Where?", "answer": "Paris."}, [*SYSTEM, *PARIS],
    ),
    "query and response": (
        "question_answer", {"query": "And?", "response": "Rome.", "history": [["Where?", "Paris."]]},
        [*PARIS, *turn("user", "And?"), *turn("assistant", "Rome.")],
    ),
    "gemini": (
        "contents",
        {"systemInstruction": {"role": "system", "parts": [{"text": "Brief."}]},
         "contents": [{"role": "user", "parts": [{"text": "Whe"}, {"text": "re?"}]},
                      {"role": "model", "parts": [{"text": "Paris."}]}]},
        [*SYSTEM, *PARIS],
    ),
    "anthropic": (
        "messages",
        {"system": [{"type": "text", "text": "Brief."}],
         "messages": [user([{"type": "text", "text": "Where?"}]),
                      assistant([{"type": "thinking", "thinking": "France.", "signature": "x"},
                                 {"type": "text", "text": "Paris."}])]},
        [*SYSTEM, *THOUGHT],
    ),
    "anthropic's tools": (
        "messages",
        {"messages": [user("Sky?"),
                      assistant([{"type": "tool_use", "id": "c1", "name": "sky", "input": {"city": "Paris"}}]),
                      user([{"type": "tool_result", "tool_use_id": "c1", "content": "blue"}]), assistant("Blue.")],
         "tools": [{"name": "sky", "input_schema": {"type": "object"}}]},
        WEATHER,
    ),
    "segments": (
        "segments",
        {"segments": [{"text": "<s>Where?", "label": False}, {"text": "Paris.</s>", "label": True}]},
        [("<s>Where?", False), ("Paris.</s>", True)],
    ),
    "labels": (
        "tokens", {"input_ids": ids_of("Hi</s>"), "labels": [-100, *ids_of("i</s>")]}, [("H", False), ("i</s>", True)],
    ),
    "mask": ("tokens", {"input_ids": ids_of("Hi</s>"), "completion_mask": [0, 1, 0]},
             [("H", False), ("i", True), ("</s>", False)]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_the_tokens_and_the_mask_of_each_format_are_those_written_by_hand(
    byte_tokenizer: HFTokenizer, name: str
) -> None:
    chat_format, record, segments = FORMATS[name]
    assert format_of(record) == chat_format
    (encoded,) = ConversationEncoder(byte_tokenizer, JinjaTemplate(AGENT)).encode(
        parse_record(record, format_of(record))
    )
    assert (encoded.tokens.tolist(), encoded.is_answer.tolist()) == masked(segments)


@pytest.mark.parametrize(
    "message, words",
    [
        (
            user("x") | {"content": [{"type": "image_url", "image_url": "x"}]},
            "turn 1: a part of type 'image_url'; only",
        ),
        ({"role": "model", "parts": [{"functionCall": {}}]}, "turn 1: a part of type 'functionCall'; only"),
        ({"role": "model", "parts": [{"text": "x", "thought": True}]}, "turn 1: a part of type 'thought'; only"),
        (
            assistant([{"type": "tool_use"}, {"type": "text", "text": "x"}]),
            "turn 1: a block of type 'text' after one of type 'tool_use'; give each its own turn",
        ),
        (user([{"type": "thinking"}]), "turn 1: a block of type 'thinking' in a turn of the user; correct its role"),
        (assistant([{"type": "tool_use", "id": "c1"}]), 'turn 1: a tool call is {"id": "c1"'),
        (assistant("x", weight=0.5), "turn 1: 'weight' is 0.5; give 1 or true to train the turn"),
        (user("x") | {"train": True}, "turn 1: 'train' is set on a turn of the user, but only the assistant's"),
        (assistant("x", train_detail=[{"begin_offset": 0}]), "turn 1: 'train_detail' weighs parts of a text"),
        (assistant(None, tool_calls=[{"type": "function"}]), 'turn 1: a tool call is {"type": "function"}, without'),
        (assistant(None, tool_calls="["), 'turn 1: tool_calls is "[", not JSON'),
        (assistant("x", reasoning_content=["y"]), 'turn 1: its reasoning is ["y"], not text'),
        (user("x") | {"tool_calls": [CALL]}, "turn 1, of the user, has tool calls or reasoning"),
        ({"from": "function_call", "value": "sky()"}, 'turn 1: the function call is "sky()", not JSON'),
    ],
)
def test_a_message_that_cannot_be_used_is_named(message: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_record({"messages": [message, assistant("y")]}, "messages")
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    "record, words",
    [
        ({"messages": [user("x"), assistant("y", weight=0)]}, "no answer has a weight other than 0"),
        ({"messages": [user("x"), assistant("y")], "tools": "{}"}, '"tools" is "{}", not a list of objects'),
        (
            {"contents": [], "tools": [{"functionDeclarations": [{"name": "sky"}]}]},
            'a tool is {"functionDeclarations": [{"name": "sky", without a name; give each function',
        ),
        (
            {"messages": [{"role": "system", "content": "a"}, assistant("y")], "system": "b"},
            'a system turn, and another text under "system"',
        ),
        ({"instruction": "x", "output": "y", "history": ["z"]}, "'history' is [\"z\"], not a list of pairs"),
        ({"question": "x", "answer": "y", "context": "z"}, '"context" beside a question, and no rule'),
        ({"segments": ["x"]}, '"segments" is no list of'),
        ({"input_ids": [1, 2], "labels": [2, 3]}, "'labels' has 2 at 0, where 'input_ids' has 1; a label is its own"),
        ({"input_ids": [1, 2], "labels": [1]}, "'labels' has 1 values for 2 'input_ids'"),
        ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "'loss_mask' has values other than 0 and 1"),
        ({"input_ids": [1, 2]}, "no key 'labels', but input_ids; correct the line or --chat-format"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(record: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_record(record, format_of(record))
    assert str(caught.value).startswith(words)


def test_tokens_outside_the_vocabulary_are_named(byte_tokenizer: HFTokenizer) -> None:
    record = parse_record({"input_ids": [1, 999], "labels": [1, 999]}, "tokens")
    with pytest.raises(DataError, match=r"the token 999 is not in the vocabulary of \d+; tokenize with the same"):
        ConversationEncoder(byte_tokenizer, PlainTemplate()).encode(record)


def test_the_plain_template_weighs_turns_and_refuses_what_it_does_not_write(byte_tokenizer: HFTokenizer) -> None:
    encoder = ConversationEncoder(byte_tokenizer, PlainTemplate())
    (encoded,) = encoder.encode(parse_record(FORMATS["train"][1], "messages"))
    segments = [("User:\nWhere?\n\nAssistant:\nParis.</s>User:\nAnd?\n\nAssistant:\n", False), ("Rome.</s>", True)]
    assert (encoded.tokens.tolist(), encoded.is_answer.tolist()) == masked(segments)
    for name in ("tool calls", "thinking"):
        with pytest.raises(DataError, match="tools, tool calls or reasoning, which the plain template does not write"):
            encoder.encode(parse_record(FORMATS[name][1], "messages"))
