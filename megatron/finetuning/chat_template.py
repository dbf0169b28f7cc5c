"""Chat templates: render a conversation to text, and mark the characters of its answers.

The plain template, for tokenizers without one of their own, with the end-of-document id after each answer:

    System:\\n{content}\\n\\nUser:\\n{content}\\n\\nAssistant:\\n{content}<end>User:\\n...

A Jinja template follows Hugging Face: it gets `messages`, `add_generation_prompt` and the tokenizer's special tokens.
An answer is the text after the generation prompt, up to and including the token that ends the turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from megatron.config import ConfigError, TokenizerConfig
from megatron.config.finetuning import FinetuningConfig, RewrittenAnswers
from megatron.core.json_text import parse_json
from megatron.data.errors import DataError
from megatron.finetuning.answer_spans import Turns, Writer, find_answer, rewritten
from megatron.finetuning.context_check import mark_context
from megatron.finetuning.conversations import ANSWERING, FORMS, Conversation, Form, Message
from megatron.finetuning.jinja_sandbox import CompiledTemplate, Rendering, Span, compile_template, reason, render
from megatron.finetuning.time_limit import TimeLimitExceeded

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Part:
    """Text that is tokenized at once, its answers, and whether an end-of-document id follows the last as part of it."""

    text: str
    answers: tuple[Span, ...]
    ends: bool
    ends_answer: bool = True
    """Whether the end-of-document id belongs to an answer that counts in the loss."""

    num_open: int = 0
    """Number of answers that no token ends."""

    num_skipped: int = 0
    """Number of answers that count nowhere, since the template rewrites them."""


Sample = list[Part]


class ChatTemplate(Protocol):
    """Renders conversations to text."""

    @property
    def description(self) -> str:
        """A string that two templates share only if they render the same text."""

    def render(self, conversation: Conversation) -> list[Sample]:
        """Render the text, as one or more samples. DataError if the template cannot render the conversation."""


@dataclass(frozen=True)
class PlainTemplate:
    """The template of the module's docstring; without role names for a tokenizer that knows no words.

    Whitespace around a turn is removed, so no byte-pair token crosses the bounds of the turn.
    """

    names_roles: bool = True

    @property
    def description(self) -> str:
        return f"plain 1, {self.names_roles}"

    def render(self, conversation: Conversation) -> list[Sample]:
        if conversation.tools or not all(message.is_plain for message in conversation.messages):
            raise DataError(
                "it has tools, tool calls or reasoning, which the plain template does not write; give --chat-template."
            )
        parts, text = [], ""
        for message in conversation.messages:
            text += f"{message.role.capitalize()}:\n" if self.names_roles else ""
            begin, text = len(text), text + message.text
            if message.role == ANSWERING:
                spans = ((begin, len(text)),) if message.is_learned else ()
                parts.append(Part(text, spans, ends=True, ends_answer=message.is_learned))
                text = ""
            else:
                text += "\n\n"
        return [parts]


@dataclass(frozen=True)
class JinjaTemplate:
    """A Jinja template, the special tokens that it may use, and the template for conversations with tools."""

    source: str
    special_tokens: tuple[tuple[str, str], ...] = ()
    tool_source: str | None = None
    rewritten_answers: RewrittenAnswers = "split"

    @property
    def description(self) -> str:
        return repr((self.source, self.special_tokens, self.tool_source, self.rewritten_answers))

    @cached_property
    def compiled(self) -> CompiledTemplate:
        """The template. Raises whatever the compiler raises."""
        return compile_template(self.source)

    @cached_property
    def compiled_for_tools(self) -> CompiledTemplate:
        """The template for conversations with tools. Raises whatever the compiler raises."""
        return compile_template(self.tool_source) if self.tool_source else self.compiled

    def render(self, conversation: Conversation) -> list[Sample]:
        """Render the conversation as one sample, and each answer that is rewritten there as `rewritten_answers` says.

        A rewritten answer's own sample also trains the answers before it that are written there as the model sees them.
        """
        messages, write = conversation.messages, self._writer(conversation)
        end_of_text = dict(self.special_tokens).get("eos_token", "")
        whole = write(messages, False, True).text
        learned = [place for place, message in enumerate(messages, start=1) if message.is_learned]
        answers = (find_answer(Turns(messages[:place], write, whole, end_of_text)) for place in learned)
        left = [replace(answer, text=whole) if answer.is_shown_in(whole) else answer for answer in answers]
        samples: list[Sample] = []
        text = whole
        while left:
            shown = [answer for answer in left if answer.is_shown_in(text)]
            left = [answer for answer in left if not answer.is_shown_in(text)]
            if left and self.rewritten_answers == "error":
                raise rewritten(left[0].place, "choose --rewritten-answers split or skip")
            if shown:
                spans = tuple(span for answer in shown for span in answer.spans)
                num_open = sum(not answer.is_ended for answer in shown)
                num_skipped = len(left) if self.rewritten_answers == "skip" else 0
                samples.append([Part(text, spans, ends=False, num_open=num_open, num_skipped=num_skipped)])
            if self.rewritten_answers == "skip":
                break
            text = left[-1].text if left else text
        if not samples:
            raise rewritten(learned[0], "choose --rewritten-answers split")
        return samples

    def _writer(self, conversation: Conversation) -> Writer:
        """Return the function that renders turns, in the first of `FORMS` in which all of them are written.

        DataError if the template leaves out a turn, a tool or a tool call.
        """
        marked = mark_context(conversation)
        reasons = []
        for form in FORMS if marked.has_calls else FORMS[:1]:
            try:
                write = partial(self._render, marked.conversation.tools, form)
                turns = marked.conversation.messages
                # Some templates write a part only while it belongs to the last question.
                marked.check(write(turns).text + write(turns[:-1], True).text)
                return partial(self._render, conversation.tools, form)
            except DataError as error:
                reasons.append(error)
        # Rather what the template leaves out than what it raised for a form that it does not expect.
        raise next((error for error in reasons if error.__cause__ is None), reasons[0])

    def _render(
        self,
        tools: Sequence[Mapping[str, Any]],
        form: Form,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        thinks: bool = True,
    ) -> Rendering:
        variables = {
            **dict(self.special_tokens),
            **({} if thinks else {"enable_thinking": False, "thinking": False}),
            "messages": [message.for_template(form) for message in messages],
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return render(self.compiled_for_tools if tools else self.compiled, variables)


def find_template(flags: TokenizerConfig, finetuning: FinetuningConfig) -> ChatTemplate:
    """Return the template of the file --chat-template, else the tokenizer's own, else the plain one.

    ConfigError if it cannot be read or is not a Jinja template.
    """
    if flags.tokenizer_type != "HFTokenizer" or flags.tokenizer_model is None:
        return PlainTemplate(names_roles=flags.tokenizer_type != "NullTokenizer")
    model = Path(flags.tokenizer_model)
    folder = model if model.is_dir() else model.parent
    settings = _read_settings(folder / "tokenizer_config.json")
    own, chat_template = folder / "chat_template.jinja", finetuning.chat_template
    where = f"--chat-template ({chat_template})" if chat_template else f"the chat template of {folder}"
    file = Path(chat_template) if chat_template else own if own.is_file() else None
    configured = settings.get("chat_template")
    source = _read(file, where) if file else _named(configured, "default")
    if source is None:
        return PlainTemplate()
    tool_source = None if file else _named(configured, "tool_use")
    template = JinjaTemplate(source, _special_tokens(settings), tool_source, finetuning.rewritten_answers)
    try:
        _ = template.compiled, template.compiled_for_tools
    except (Exception, TimeLimitExceeded) as error:
        raise ConfigError(f"{where} is no Jinja template: {reason(error)}; repair it or give another file.") from error
    return template


def _read(file: Path, where: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} cannot be read: {error}; give a file that holds a Jinja template.") from error


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no readable JSON: {error}; repair it.") from error
    return settings if isinstance(settings, dict) else {}


def _named(configured: Any, name: str) -> str | None:
    """Return the template of a tokenizer_config.json: text, which is the default, or one of a list of named ones."""
    if isinstance(configured, list):
        named = {entry.get("name"): entry.get("template") for entry in configured if isinstance(entry, dict)}
        configured = named.get(name)
    elif name != "default":
        return None
    return configured if isinstance(configured, str) else None


def _special_tokens(settings: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return names and texts; a token is given as text or as an object with its text."""
    given = {name: settings.get(name) for name in SPECIAL_TOKENS}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in given.items()}
    return tuple((name, text) for name, text in texts.items() if isinstance(text, str))
