"""The tokens are those of the whole conversation, and those that count are the answers and what ends them."""

from collections.abc import Callable
from itertools import groupby

import pytest
from transformers import PreTrainedTokenizerFast

from megatron.data.errors import DataError
from megatron.finetuning.chat_template import JinjaTemplate, Part, PlainTemplate
from megatron.finetuning.conversations import Conversation, Message
from megatron.finetuning.encoding import ConversationEncoder
from megatron.finetuning.jinja_sandbox import compile_template
from megatron.tokenizer.hugging_face import HFTokenizer
from megatron.tokenizer.null import NullTokenizer
from tests.unit.finetuning.conftest import CHATML, KINDS, Chat

TURNS = (
    Message("user", "What does the cat do?  "),
    Message("assistant", "The cat sat on the mat, it's 👩‍👩‍👧‍👦 漢字."),
    Message("user", " and\n\nthe dog?"),
    Message("assistant", "aa\n\n  - the\tthing\n  - the other"),
)
CONVERSATIONS = [Conversation(turns) for turns in (TURNS, (Message("system", "Be brief."), *TURNS), TURNS[:2])]
BY_KIND = pytest.mark.parametrize("kind", KINDS)
BY_CONVERSATION = pytest.mark.parametrize("conversation", CONVERSATIONS, ids=["two", "system", "one"])


def as_messages(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in conversation.messages]


def their_tokenizer(chat: Chat) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(chat.flags.tokenizer_model)


def ended(kind: str, content: str) -> list[str]:
    """What the model is to write for an answer; the plain template's end has no text in some tokenizers."""
    return {"hf chatml": [content + "<|im_end|>"], "hf llama2": [f" {content} </s>"]}.get(kind, [content])


@BY_KIND
@BY_CONVERSATION
def test_the_tokens_that_count_are_exactly_the_answers(
    make_chat: Callable[[str], Chat], kind: str, conversation: Conversation
) -> None:
    encoder = make_chat(kind).encoder
    (encoded,), tokenizer = encoder.encode(conversation), encoder.tokenizer
    runs = groupby(zip(encoded.tokens.tolist(), encoded.is_answer, strict=True), key=lambda pair: pair[1])
    answers = [[token for token, _ in run] for counts, run in runs if counts]
    if kind not in ("hf chatml", "hf llama2"):
        assert {answer.pop() for answer in answers} == {tokenizer.eod}
    expected = [ended(kind, turn.content) for turn in conversation.messages if turn.role == "assistant"]
    assert [[tokenizer.detokenize(answer)] for answer in answers] == expected


@BY_KIND
@BY_CONVERSATION
def test_the_tokens_are_those_of_the_whole_text(
    make_chat: Callable[[str], Chat], kind: str, conversation: Conversation
) -> None:
    chat = make_chat(kind)
    tokenizer = chat.encoder.tokenizer
    tokenize = tokenizer.tokenize
    if isinstance(tokenizer, HFTokenizer) and kind != "hf plain":
        tokenize = tokenizer.tokenize_markup
    whole: list[int] = []
    (sample,) = chat.template.render(conversation)
    for part in sample:
        whole += [*tokenize(part.text), *([tokenizer.eod] if part.ends else [])]
    assert chat.encoder.encode(conversation)[0].tokens.tolist() == whole


@pytest.mark.parametrize("kind, is_special", [("hf chatml", True), ("hf plain", False)])
def test_special_tokens_of_a_text_are_special_where_the_template_writes_such(
    make_chat: Callable[[str], Chat], kind: str, is_special: bool
) -> None:
    chat = make_chat(kind)
    conversation = Conversation((Message("user", "say <|im_end|> now, please, do it"), Message("assistant", "no")))
    tokens = chat.encoder.encode(conversation)[0].tokens.tolist()
    (end,) = chat.encoder.tokenizer.tokenize_markup("<|im_end|>")  # type: ignore[attr-defined]
    assert tokens.count(end) == (3 if is_special else 0)


@pytest.mark.parametrize("kind", ["hf chatml", "hf llama2"])
@BY_CONVERSATION
def test_the_tokens_are_those_of_transformers(
    make_chat: Callable[[str], Chat], kind: str, conversation: Conversation
) -> None:
    chat = make_chat(kind)
    theirs = their_tokenizer(chat).apply_chat_template(as_messages(conversation), return_dict=True)
    assert chat.encoder.encode(conversation)[0].tokens.tolist() == theirs["input_ids"]


def test_generation_marks_and_ours_agree(make_chat: Callable[[str], Chat]) -> None:
    chat = make_chat("hf llama2")
    expected = their_tokenizer(chat).apply_chat_template(
        as_messages(Conversation(TURNS)), return_dict=True, return_assistant_tokens_mask=True
    )
    (encoded,) = chat.encoder.encode(Conversation(TURNS))
    assert encoded.tokens.tolist() == expected["input_ids"]
    assert encoded.is_answer.tolist() == [bool(mark) for mark in expected["assistant_masks"]]


def test_numbers_need_no_names_of_roles() -> None:
    encoder = ConversationEncoder(NullTokenizer(20), PlainTemplate(names_roles=False))
    (encoded,) = encoder.encode(Conversation((Message("user", "1 2 3"), Message("assistant", "4 5"))))
    assert encoded.tokens.tolist() == [1, 2, 3, 4, 5, 20]
    assert encoded.is_answer.tolist() == [False] * 3 + [True] * 3


def encode_with(chat: Chat, template: str) -> list[bool]:
    return (
        ConversationEncoder(chat.encoder.tokenizer, JinjaTemplate(template))
        .encode(CONVERSATIONS[2])[0]
        .is_answer.tolist()
    )


def test_a_token_across_the_bound_of_an_answer_is_refused(make_chat: Callable[[str], Chat]) -> None:
    chat = make_chat("hf chatml")
    template = "{% for m in messages %}{{ m.role + ': t' + m.content }}{% endfor %}"
    turns = Conversation((Message("user", "a"), Message("assistant", "he cat")))
    with pytest.raises(DataError, match="a token holds the bound of an answer"):
        ConversationEncoder(chat.encoder.tokenizer, JinjaTemplate(template)).encode(turns)


def test_a_header_that_is_not_in_the_generation_prompt_does_not_count(make_chat: Callable[[str], Chat]) -> None:
    chat = make_chat("hf chatml")
    without = CHATML.replace("{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", "")
    assert without != CHATML
    assert encode_with(chat, without) == encode_with(chat, CHATML)


@pytest.mark.parametrize(
    "template, words",
    [
        ("{% for m in messages %}{{ m.content.upper() }}{% endfor %}", "does not write the answer of turn 2"),
        ("{{ raise_exception('no such chat') }}", "refuses it: no such chat"),
        ("{{ messages[0].content + messages | length | string + messages[-1].content }}", "in another way"),
        ("{{ 1 / (messages | length - 2) }}", "refuses it: ZeroDivisionError: division by zero; change the line or"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses it: RecursionError: maximum recursion depth"),
        ("{{ messages[0].content.encode('ascii').decode('x') }}", "refuses it: LookupError: unknown encoding: x;"),
        ("{{ 'a' * 10 ** 15 }}{{ messages[0].content }}", "refuses it: MemoryError"),
        ("{% for i in range(messages | length * 99999) %}{% endfor %}", "refuses it: OverflowError: Range too big"),
        ("{{ messages.append(messages[0]) }}", "refuses it: access to attribute 'append' of 'list' object is unsafe"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refuses it: access to attribute '__class__'"),
        ("{{ raise_exception('two\nlines') }}", "refuses it: two lines; change the line"),
    ],
)
def test_a_template_that_cannot_serve_is_refused(make_chat: Callable[[str], Chat], template: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        encode_with(make_chat("hf chatml"), template)


@pytest.mark.parametrize(
    "expression",
    [
        "m.content | tojson",
        "{'b': m.content, 'a': [1, '漢<&>']} | tojson(indent=2, sort_keys=true)",
        "{'b': 1, 'a': 2} | tojson(separators=(',', ':'), ensure_ascii=true)",
        "strftime_now('%Y')",
    ],
)
def test_extras_of_templates_are_those_of_transformers(make_chat: Callable[[str], Chat], expression: str) -> None:
    source = (
        "{% for m in messages %}{% if loop.index0 > 3 %}{% break %}{% endif %}\n  {% if true %}\n"
        f"{{{{ {expression} }}}}{{% endif %}}{{{{ m.role + m.content + eos_token }}}}\n{{% endfor %}}"
    )
    conversation, chat = CONVERSATIONS[0], make_chat("hf chatml")
    template = JinjaTemplate(source, (("eos_token", "</s>"),))
    theirs = their_tokenizer(chat).apply_chat_template(as_messages(conversation), chat_template=source, tokenize=False)
    assert compile_template(source).template.render(messages=as_messages(conversation), eos_token="</s>") == theirs
    if "content" not in expression:
        ((part,),) = template.render(conversation)
        assert part.text == theirs


@pytest.mark.parametrize("length", ["99999", "messages | length * 9999"])
def test_a_template_without_an_end_is_refused(
    make_chat: Callable[[str], Chat], monkeypatch: pytest.MonkeyPatch, length: str
) -> None:
    monkeypatch.setattr("megatron.finetuning.jinja_sandbox.SECONDS_TO_RENDER", 0.2)
    loop = f"{{% for i in range({length}) %}}"
    template = f"{loop * 3}{'{% endfor %}' * 3}"
    with pytest.raises(DataError, match=r"refuses it: it takes more than 0\.2 seconds; change the line or"):
        encode_with(make_chat("hf chatml"), template)
    assert len(encode_with(make_chat("hf chatml"), CHATML)) > 0


def test_an_answer_that_nothing_precedes_has_nothing_to_learn() -> None:
    class Bare:
        description = "bare"

        def render(self, conversation: Conversation) -> list[list[Part]]:
            return [[Part("7", ((0, 1),), ends=False)]]

    with pytest.raises(DataError, match="no token that others precede"):
        ConversationEncoder(NullTokenizer(20), Bare()).encode(CONVERSATIONS[2])


def test_an_answer_that_is_also_in_its_header_counts_once(make_chat: Callable[[str], Chat]) -> None:
    encoder = make_chat("hf chatml").encoder
    (encoded,) = encoder.encode(Conversation((Message("user", "Who?"), Message("assistant", "assistant"))))
    assert encoder.tokenizer.detokenize(encoded.tokens[encoded.is_answer].tolist()) == "assistant<|im_end|>"


def test_a_template_that_changes_earlier_answers_is_refused(make_chat: Callable[[str], Chat]) -> None:
    source = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '-' + m.content }}{% endfor %}"
    template = JinjaTemplate(source, rewritten_answers="error")
    encoder = ConversationEncoder(make_chat("hf chatml").encoder.tokenizer, template)
    with pytest.raises(DataError, match="writes turn 2 in another way when turns follow"):
        encoder.encode(CONVERSATIONS[0])
