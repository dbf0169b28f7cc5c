"""The mask of the answers against one computed without the template: by hand for the shapes that are in public use.

The tokenizer has a token per byte and per special token, so that every bound is one between tokens.
"""

import pytest

from megatron.data.errors import DataError
from megatron.finetuning.chat_template import JinjaTemplate
from megatron.finetuning.conversations import Conversation, Message
from megatron.finetuning.encoding import ConversationEncoder
from megatron.tokenizer.hugging_face import HFTokenizer
from tests.unit.finetuning.conftest import ids_of

Segments = list[tuple[str, bool]]
"""Texts, and whether the model writes them."""


# Each pair: a template, and the text of a conversation by turns.
ALL = "{% for message in messages %}"
CHATML = (
    ALL + "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chatml(role: str, content: str) -> Segments:
    return [(f"<|im_start|>{role}\n", False), (f"{content}<|im_end|>", role == "assistant"), ("\n", False)]


LLAMA2 = (
    ALL + "{% if message.role == 'assistant' %}{{ ' ' + message.content | trim + ' </s>' }}{% else %}"
    "{{ '<s>[INST] ' + message.content | trim + ' [/INST]' }}{% endif %}{% endfor %}"
)


def llama2(role: str, content: str) -> Segments:
    text = content.strip()
    return [(f" {text} </s>", True)] if role == "assistant" else [(f"<s>[INST] {text} [/INST]", False)]


LLAMA3 = (
    ALL + "{% set content = '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim"
    " + '<|eot_id|>' %}{% if loop.first %}{{ '<|begin_of_text|>' }}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


def llama3(role: str, content: str) -> Segments:
    header = f"<|start_header_id|>{role}<|end_header_id|>\n\n"
    return [(header, False), (f"{content.strip()}<|eot_id|>", role == "assistant")]


ALPACA = (
    ALL + "{% if message.role == 'assistant' %}{{ message.content + '</s>\\n\\n' }}{% else %}"
    "{{ '### Instruction:\\n' + message.content + '\\n\\n### Response:\\n' }}{% endif %}{% endfor %}"
)


def alpaca(role: str, content: str) -> Segments:
    if role == "assistant":
        return [(f"{content}</s>", True), ("\n\n", False)]
    return [(f"### Instruction:\n{content}\n\n### Response:\n", False)]


# The prompt for generation, which is not asked for, ends the text of a user; the answer follows its space.
VICUNA = (
    ALL + "{% if message.role == 'assistant' %}{{ 'ASSISTANT: ' + message.content + '</s>' }}{% else %}"
    "{{ 'USER: ' + message.content + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def vicuna(role: str, content: str) -> Segments:
    if role == "assistant":
        return [("ASSISTANT:", False), (f" {content}</s>", True)]
    return [(f"USER: {content} ", False)]


ZEPHYR = (
    ALL + "{{ '<|' + message.role + '|>\\n' + message.content + '</s>' }}\n"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}\n{% endfor %}"
)


def zephyr(role: str, content: str) -> Segments:
    if role == "assistant":
        return [("<|assistant|>", False), (f"\n{content}</s>", True), ("\n", False)]
    return [(f"<|{role}|>\n{content}</s>\n", False)]


GEMMA = (
    ALL + "{% set role = 'model' if message.role == 'assistant' else message.role %}"
    "{{ '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


def gemma(role: str, content: str) -> Segments:
    name, counts = ("model", True) if role == "assistant" else (role, False)
    return [(f"<start_of_turn>{name}\n", False), (f"{content.strip()}<end_of_turn>", counts), ("\n", False)]


PHI = (
    ALL + "{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def phi(role: str, content: str) -> Segments:
    return [(f"<|{role}|>\n", False), (f"{content}<|end|>", role == "assistant"), ("\n", False)]


MISTRAL = (
    "{{ '<s>' }}" + ALL + "{% if message.role == 'assistant' %}{{ message.content + '</s>' }}{% else %}"
    "{{ '[INST]' + message.content + '[/INST]' }}{% endif %}{% endfor %}"
)


def mistral(role: str, content: str) -> Segments:
    return [(f"{content}</s>", True)] if role == "assistant" else [(f"[INST]{content}[/INST]", False)]


# Headers that no prompt announces.
QUESTIONS = (
    ALL + "{{ ('### A: ' if message.role == 'assistant' else '### Q: ') + message.content + '</s>' }}{% endfor %}"
)


def questions(role: str, content: str) -> Segments:
    if role == "assistant":
        return [("### A: ", False), (f"{content}</s>", True)]
    return [(f"### Q: {content}</s>", False)]


LINES = ALL + "{{ message.role.upper() + ': ' + message.content.strip() + '\\n' }}{% endfor %}"


def lines(role: str, content: str) -> Segments:
    return [(f"{role.upper()}: ", False), (f"{content.strip()}\n", role == "assistant")]


# An empty thought before what has none, as Qwen 3 writes it; the prompt for generation holds no thought.
THOUGHTS = (
    ALL + "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' and '</think>' not in message.content %}{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{% endif %}{{ message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def thoughts(role: str, content: str) -> Segments:
    empty = role == "assistant" and "</think>" not in content
    header, answer, end = chatml(role, content)
    return [header, ("<think>\n\n</think>\n\n" if empty else "", False), answer, end]


# The prompt for generation begins the thought that answers hold.
STARTED = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")


def started(role: str, content: str) -> Segments:
    thought = "<think>\n" if role == "assistant" and content.startswith("<think>\n") else ""
    header, _, end = chatml(role, content)
    answer = f"{content.removeprefix(thought)}<|im_end|>"
    return [header, (thought, False), (answer, role == "assistant"), end]


SHAPES = {
    "chatml": (CHATML, chatml),
    "llama 2": (LLAMA2, llama2),
    "llama 3": (LLAMA3, llama3),
    "alpaca": (ALPACA, alpaca),
    "vicuna": (VICUNA, vicuna),
    "zephyr": (ZEPHYR, zephyr),
    "gemma": (GEMMA, gemma),
    "phi": (PHI, phi),
    "mistral": (MISTRAL, mistral),
    "questions": (QUESTIONS, questions),
    "lines": (LINES, lines),
    "thoughts": (THOUGHTS, thoughts),
    "started": (STARTED, started),
}
ANSWERS = [
    *("A", ":", "#", "### A", "A: ", " ", "s", "e", "ASSISTANT", "assistant", "model", "\n", "think", "</think>"),
    *("<|im_end|>", "</s>", "<|assistant|>", "[/INST]", "x [INST] y", "Yes.", "question", "  padded\n", "<think>\nhm"),
    *("<think>\nhm\n</think>\n\nYes.", "aNsWeR-0-", "aNsWeR-0", "{{ messages }}", "漢字 €", "<|im_start|>assistant\n"),
]


def conversations(answer: str) -> list[tuple[Message, ...]]:
    """An answer alone, after an equal one, before another, and after a question with the same words."""
    asked, said = Message("user", "question"), Message("assistant", answer)
    other = Message("assistant", "Yes.")
    return [(asked, said), (asked, said, asked, said), (asked, other, asked, said, asked, other),
            (Message("user", answer), said)]  # fmt: skip


def expected(shape: str, conversation: tuple[Message, ...]) -> tuple[list[int], list[bool]]:
    _, write = SHAPES[shape]
    segments = [segment for turn in conversation for segment in write(turn.role, turn.content)]
    begin = {"llama 3": "<|begin_of_text|>", "mistral": "<s>"}.get(shape, "")
    marked = [(token, counts) for text, counts in [(begin, False), *segments] for token in ids_of(text)]
    return [token for token, _ in marked], [counts for _, counts in marked]


@pytest.mark.parametrize("answer", [answer for answer in ANSWERS if answer.strip()])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_mask_is_that_of_the_answers_and_their_ends(byte_tokenizer: HFTokenizer, shape: str, answer: str) -> None:
    encoder = ConversationEncoder(byte_tokenizer, JinjaTemplate(SHAPES[shape][0]))
    for conversation in conversations(answer):
        (encoded,) = encoder.encode(Conversation(conversation))
        tokens, is_answer = expected(shape, conversation)
        assert encoded.tokens.tolist() == tokens
        assert encoded.is_answer.tolist() == is_answer


@pytest.mark.parametrize(
    "template",
    [
        ALL + "{{ message.role + ': ' + message.content.upper() + '</s>' }}{% endfor %}",
        ALL + "{{ message.role + ': ' + message.content.replace('a', 'b') + '</s>' }}{% endfor %}",
        ALL + "{{ message.role + ': ' + message.content + '</s>' + message.content }}{% endfor %}",
        ALL + "{{ message.role + ': ' + message.content[: 3 if loop.index0 else 99] + '</s>' }}{% endfor %}",
        ALL + "{{ message.role + message.content | length | string + message.content + '</s>' }}{% endfor %}",
        ALL + "{{ message.role + (' a' if 'cat' in message.content else ' ') + message.content + '</s>' }}{% endfor %}",
        ALL + "{{ message.role + ': ' }}{% endfor %}{{ messages[0].content }}",
    ],
    ids=["upper case", "replaced", "twice", "cut", "its length", "a header by content", "left out"],
)
def test_a_template_whose_mask_cannot_be_exact_is_refused(byte_tokenizer: HFTokenizer, template: str) -> None:
    conversation = (Message("user", "Which?"), Message("assistant", "a cat"))
    with pytest.raises(DataError, match="does not write the answer of turn 2 as it is given, once"):
        ConversationEncoder(byte_tokenizer, JinjaTemplate(template)).encode(Conversation(conversation))


def test_a_text_that_ends_as_the_answer_begins_is_no_prompt(byte_tokenizer: HFTokenizer) -> None:
    template = JinjaTemplate(ALL + "{{ message.content + '\\n' }}{% endfor %}A")
    with pytest.raises(DataError, match=r"ends turn 2 with .* only while no turn follows"):
        ConversationEncoder(byte_tokenizer, template).encode(
            Conversation((Message("user", "q"), Message("assistant", "A")))
        )
