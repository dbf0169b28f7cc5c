"""Templates whose text of an answer depends on what follows it: samples and masks against texts written by hand.

What the model sees for an answer is the text of the turns before it with the generation prompt.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from megatron.data.errors import DataError
from megatron.finetuning.chat_template import JinjaTemplate
from megatron.finetuning.conversations import Conversation, Message, ToolCall
from megatron.finetuning.encoding import ConversationEncoder
from megatron.tokenizer.hugging_face import HFTokenizer
from tests.unit.finetuning.conftest import CHATML, Segments, masked
from tests.unit.finetuning.test_chat_formats import AGENT, TOOL

ASKED, ASKED_AGAIN = Message("user", "Where?"), Message("user", "And?")
PARIS, ROME = Message("assistant", "Paris."), Message("assistant", "Rome.")
PARIS_THOUGHT = Message("assistant", "Paris.", reasoning="France.")
ROME_THOUGHT = Message("assistant", "Rome.", reasoning="Italy.")
TWO = (ASKED, PARIS, ASKED_AGAIN, ROME)
THOUGHTS = (ASKED, PARIS_THOUGHT, ASKED_AGAIN, ROME_THOUGHT)
SYSTEM = Message("system", "Brief.")

# Reasoning of answers before the last question is dropped, and an answer after it has an empty thought.
DROPPING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
# Channels, one end of an answer that is the last and another of one that is not, and reasoning in the last alone.
CHANNELS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.role == 'assistant' %}"
    "{% if loop.last and m.thinking %}{{ '<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}"
    "{{ '<|im_start|>assistant' }}{% endif %}"
    "{{ '<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
# The system message stands in the last question, while no answer follows it.
IN_LAST_QUESTION = (
    "{{ '<s>' }}{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (messages[0].content + ' ' if loop.last and messages[0].role == 'system' else '') + m.content }}"
    "{{ '[/INST]' }}{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
# Every text ends with a token, unless the prompt does.
CLOSED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{{ '<|assistant|>\\n' if add_generation_prompt else eos_token }}"
)
ALWAYS_ASKING = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}{{ '<|assistant|>' }}"
)


def encode(tokenizer: HFTokenizer, template: JinjaTemplate, *messages: Message) -> list[tuple[list[int], list[bool]]]:
    encoded = ConversationEncoder(tokenizer, template).encode(Conversation(messages))
    return [(sample.tokens.tolist(), sample.is_answer.tolist()) for sample in encoded]


def chatml(role: str, *texts: tuple[str, bool]) -> Segments:
    return [(f"<|im_start|>{role}\n", False), *texts, ("\n", False)]


ASKED_ML, AND_ML = chatml("user", ("Where?<|im_end|>", False)), chatml("user", ("And?<|im_end|>", False))
PLAIN_PARIS = chatml("assistant", ("Paris.<|im_end|>", False))
EMPTY = ("<think>\n\n</think>\n\n", False)
LAST = [*ASKED_ML, *PLAIN_PARIS, *AND_ML]
FIRST_CHANNEL = [("<|im_start|>user<|message|>Where?<|end|><|im_start|>assistant", False)]
AND_CHANNEL = [
    ("<|channel|>final<|message|>Paris.<|end|><|im_start|>user<|message|>And?<|end|><|im_start|>assistant", False)
]
SHAPES: dict[str, tuple[str, Sequence[Message], list[Segments]]] = {
    "dropped reasoning": (DROPPING, THOUGHTS, [
        [*LAST, *chatml("assistant", ("<think>\nItaly.\n</think>\n\nRome.<|im_end|>", True))],
        [*ASKED_ML, *chatml("assistant", ("<think>\nFrance.\n</think>\n\nParis.<|im_end|>", True))],
    ]),
    "empty thoughts": (DROPPING, TWO, [
        [*LAST, *chatml("assistant", EMPTY, ("Rome.<|im_end|>", True))],
        [*ASKED_ML, *chatml("assistant", EMPTY, ("Paris.<|im_end|>", True))],
    ]),
    "channels": (CHANNELS, THOUGHTS, [
        [*FIRST_CHANNEL, *AND_CHANNEL, ("<|channel|>analysis<|message|>Italy.<|end|><|im_start|>assistant"
                                        "<|channel|>final<|message|>Rome.<|return|>", True)],
        [*FIRST_CHANNEL, ("<|channel|>analysis<|message|>France.<|end|><|im_start|>assistant<|channel|>final<|message|>"
                          "Paris.<|return|>", True)],
    ]),
    "in the last question": (IN_LAST_QUESTION, (SYSTEM, *TWO), [
        [("<s>[INST] Where?[/INST] Paris.</s>[INST] Brief. And?[/INST]", False), (" Rome.</s>", True)],
        [("<s>[INST] Brief. Where?[/INST]", False), (" Paris.</s>", True)],
    ]),
    "closed": (CLOSED, TWO, [
        [("<|user|>\nWhere?<|end|>\n<|assistant|>\n", False), ("Paris.<|end|>", True),
         ("\n<|user|>\nAnd?<|end|>\n<|assistant|>\n", False), ("Rome.<|end|>", True), ("\n</s>", False)],
    ]),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_answer_is_trained_once_with_the_text_that_the_model_sees(
    byte_tokenizer: HFTokenizer, shape: str
) -> None:
    source, messages, samples = SHAPES[shape]
    found = encode(byte_tokenizer, JinjaTemplate(source, (("eos_token", "</s>"),)), *messages)
    assert sorted(found) == sorted(masked(segments) for segments in samples)


def test_rewritten_answers_are_left_out_or_refused_where_asked(byte_tokenizer: HFTokenizer) -> None:
    _, _, samples = SHAPES["dropped reasoning"]
    skipping = JinjaTemplate(DROPPING, rewritten_answers="skip")
    assert encode(byte_tokenizer, skipping, *THOUGHTS) == [masked(samples[0])]
    (skipped,) = ConversationEncoder(byte_tokenizer, skipping).encode(Conversation(THOUGHTS))
    assert skipped.num_skipped == 1
    with pytest.raises(DataError, match=r"writes turn 2 in another way .*choose --rewritten-answers split or skip"):
        encode(byte_tokenizer, JinjaTemplate(DROPPING, rewritten_answers="error"), *THOUGHTS)
    assert len(encode(byte_tokenizer, JinjaTemplate(CHATML, rewritten_answers="error"), *TWO)) == 1


def test_answers_of_several_steps_share_the_sample_of_their_question(byte_tokenizer: HFTokenizer) -> None:
    """Reasoning is kept as long as no question follows, so that both answers to one question share their text."""
    steps = (ASKED, PARIS_THOUGHT, Message("tool", "found"), ROME_THOUGHT, ASKED_AGAIN, ROME_THOUGHT)
    samples = encode(byte_tokenizer, JinjaTemplate(DROPPING), *steps)
    written = [
        byte_tokenizer.detokenize([t for t, counts in zip(*sample, strict=True) if counts]) for sample in samples
    ]
    last = "<think>\nItaly.\n</think>\n\nRome.<|im_end|>"
    assert written == [last, "<think>\nFrance.\n</think>\n\nParis.<|im_end|>" + last]


def test_answers_without_weight_cause_no_samples(byte_tokenizer: HFTokenizer) -> None:
    ignored = Message("assistant", "Paris.", reasoning="France.", is_trained=False)
    samples = encode(byte_tokenizer, JinjaTemplate(DROPPING), ASKED, ignored, ASKED_AGAIN, ROME_THOUGHT)
    assert samples == [masked(SHAPES["dropped reasoning"][2][0])]


MARKED = CHATML.replace(
    "message.content + '<|im_end|>\n' }}",
    "'' }}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\n' }}",
)
CALLING = Message("assistant", None, tool_calls=(ToolCall("sky", {"city": "Paris"}),))
AS_TEXT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    "source", [AS_TEXT, AS_TEXT.replace("' ' + c.function.arguments", "' ' ~ c.function.arguments")]
)
def test_arguments_are_given_in_the_form_that_is_written_as_json(byte_tokenizer: HFTokenizer, source: str) -> None:
    (sample,) = encode(byte_tokenizer, JinjaTemplate(source), ASKED, CALLING)
    called = chatml("assistant", ('sky {"city": "Paris"}<|im_end|>', True))
    assert sample == masked([*ASKED_ML, *called])


@pytest.mark.parametrize(
    "source, conversation, words",
    [
        (CHATML, Conversation((ASKED, PARIS_THOUGHT)), "does not write the reasoning of turn 2 once, as it is given"),
        (AGENT.replace("m.tool_calls", "[]"), Conversation((ASKED, CALLING)), "leaves out the name of the tool"),
        (AGENT.replace("if tools", "if false"), Conversation((ASKED, PARIS), (TOOL,)), "leaves out the tools"),
        (AS_TEXT.replace(" + ' ' + c.function.arguments", ""), Conversation((ASKED, CALLING)), "out the arguments"),
        (CHATML.replace("in messages", "in messages if message.role != 'system'"), Conversation((SYSTEM, ASKED, PARIS)),
         "leaves out turn 1, of the system"),
        (ALWAYS_ASKING, Conversation((ASKED, PARIS)), "ends turn 2 with '<|end|><|assistant|>' only while"),
        (MARKED, Conversation((ASKED, replace(PARIS, content="\ufdd0x\ufdd1"))), "has a character U+FDD0 or U+FDD1"),
    ],
    ids=["reasoning", "calls", "tools", "arguments", "system", "always asking", "marks"],
)  # fmt: skip
def test_a_template_that_leaves_something_out_is_refused(
    byte_tokenizer: HFTokenizer, source: str, conversation: Conversation, words: str
) -> None:
    with pytest.raises(DataError) as caught:
        ConversationEncoder(byte_tokenizer, JinjaTemplate(source)).encode(conversation)
    assert words in str(caught.value)


def test_marks_of_generation_are_used_as_they_stand(byte_tokenizer: HFTokenizer) -> None:
    (sample,) = encode(byte_tokenizer, JinjaTemplate(MARKED), *TWO)
    first, last = (chatml("assistant", (text, True), ("<|im_end|>", False)) for text in ("Paris.", "Rome."))
    assert sample == masked([*ASKED_ML, *first, *AND_ML, *last])


def test_answers_that_no_token_ends_are_counted(byte_tokenizer: HFTokenizer) -> None:
    open_ended = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    (sample,) = ConversationEncoder(byte_tokenizer, JinjaTemplate(open_ended)).encode(Conversation(TWO))
    assert sample.num_open == 2
