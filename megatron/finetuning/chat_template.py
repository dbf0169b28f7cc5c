"""Chat templates: render a conversation to text, and mark the characters of its answers.

The plain template, for tokenizers without one of their own, with the end-of-document id after each answer:

    System:\\n{content}\\n\\nUser:\\n{content}\\n\\nAssistant:\\n{content}<end>User:\\n...

A Jinja template follows Hugging Face: it gets `messages`, `add_generation_prompt` and the tokenizer's special tokens.
An answer is the text after the generation prompt, up to and including the token that ends the turn.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NoReturn, Protocol

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron.config import ConfigError, TokenizerConfig
from megatron.core.json_text import parse_json
from megatron.data.errors import DataError
from megatron.finetuning.conversations import ANSWERING, Conversation, Message
from megatron.finetuning.time_limit import TimeLimitExceeded, cpu_time_limit

Span = tuple[int, int]  # first character, one past the last
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
SECONDS_TO_RENDER = 10.0  # of CPU time; a conversation of a million tokens takes less than one


@dataclass(frozen=True)
class Part:
    """Text that is tokenized at once, its answers, and whether an end-of-document id follows as part of an answer."""

    text: str
    answers: tuple[Span, ...]
    ends: bool


class ChatTemplate(Protocol):
    """Renders conversations to text."""

    @property
    def description(self) -> str:
        """A string that two templates share only if they render the same text."""

    def render(self, conversation: Conversation) -> list[Part]:
        """Render the text, in parts. DataError if the template cannot render the conversation."""


@dataclass(frozen=True)
class PlainTemplate:
    """The template of the module's docstring; without role names for a tokenizer that knows no words.

    Whitespace around a turn is removed, so no byte-pair token crosses the bounds of the turn.
    """

    names_roles: bool = True

    @property
    def description(self) -> str:
        return f"plain 1, {self.names_roles}"

    def render(self, conversation: Conversation) -> list[Part]:
        parts, text = [], ""
        for message in conversation:
            text += f"{message.role.capitalize()}:\n" if self.names_roles else ""
            begin, text = len(text), text + message.content.strip()
            if message.role == ANSWERING:
                parts.append(Part(text, ((begin, len(text)),), ends=True))
                text = ""
            else:
                text += "\n\n"
        return parts


@dataclass(frozen=True)
class JinjaTemplate:
    """A Jinja template and the special tokens that it may use."""

    source: str
    special_tokens: tuple[tuple[str, str], ...] = ()

    @property
    def description(self) -> str:
        return repr((self.source, self.special_tokens))

    @cached_property
    def compiled(self) -> jinja2.Template:
        """The template, compiled in a sandbox. Raises whatever the compiler raises."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(self.source)

    def render(self, conversation: Conversation) -> list[Part]:
        text = self._text(conversation)
        turns = [place for place, message in enumerate(conversation) if message.role == ANSWERING]
        return [Part(text, tuple(self._answer(conversation, turn, text) for turn in turns), ends=False)]

    def _answer(self, conversation: Conversation, turn: int, text: str) -> Span:
        """Find the characters of `text`, the whole conversation, that the assistant writes in a turn."""
        answered, before = self._text(conversation[: turn + 1]), self._text(conversation[:turn])
        header, tail = self._around_answer(conversation[: turn + 1], answered)
        prompt = self._text(conversation[:turn], add_generation_prompt=True)
        is_announced = prompt != before and answered.startswith(prompt)
        if not is_announced:
            prompt = before
        follows = answered.startswith(prompt) and (is_announced or header.startswith(prompt))
        if not follows or not text.startswith(answered):
            raise DataError(
                f"the chat template writes turn {turn + 1} in another way when turns follow, so that what the model "
                "would see there is not what it is trained on; give one line for each answer, or another "
                "--chat-template."
            )
        end = len(answered) - len(tail)
        # Some contents have no header, such as one with a thought where other contents get an empty thought.
        begins = (len(header), len(prompt)) if answered.startswith(header) else (len(prompt),)
        content = conversation[turn].content.strip()
        begin = next((begin for begin in begins if answered[begin:end].strip() == content), None)
        if begin is None or len(prompt) > end or not answered.endswith(tail):
            raise _changed_answer(turn)
        if not answered[len(prompt) : begin].strip():
            begin = len(prompt)  # text other than whitespace there comes from the template, not from the model
        closed = tail.rstrip()
        # If a template ends a turn with only whitespace, that whitespace is the end.
        return begin, end + len(closed) if closed else len(answered)

    def _around_answer(self, conversation: Conversation, answered: str) -> tuple[str, str]:
        """Find what the template writes before and after the content of the last turn, whose text is `answered`.

        A mark replaces the content, so words that header and content share cannot be confused. DataError if the mark
        is not rendered exactly once and unchanged.
        """
        mark = next(mark for number in count() if (mark := f"aNsWeR-{number}-") not in answered)
        header, *tails = self._text((*conversation[:-1], Message(ANSWERING, mark))).split(mark)
        if len(tails) != 1:
            raise _changed_answer(len(conversation) - 1)
        return header, tails[0]

    def _text(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        messages = [{"role": message.role, "content": message.content} for message in conversation]
        settings = {"add_generation_prompt": add_generation_prompt, **dict(self.special_tokens)}
        try:
            with cpu_time_limit(SECONDS_TO_RENDER):
                return self.compiled.render(messages=messages, tools=None, documents=None, **settings)
        except (Exception, TimeLimitExceeded) as error:  # a template is a program and may raise anything
            raise DataError(
                f"the chat template refuses it: {_reason(error)}; change the line or --chat-template."
            ) from error


def find_template(flags: TokenizerConfig, chat_template: str | None) -> ChatTemplate:
    """Return the template of the file `chat_template`, else the tokenizer's own, else the plain one.

    ConfigError if it cannot be read or is not a Jinja template.
    """
    if flags.tokenizer_type != "HFTokenizer" or flags.tokenizer_model is None:
        return PlainTemplate(names_roles=flags.tokenizer_type != "NullTokenizer")
    model = Path(flags.tokenizer_model)
    folder = model if model.is_dir() else model.parent
    settings = _read_settings(folder / "tokenizer_config.json")
    own = folder / "chat_template.jinja"
    where = f"--chat-template ({chat_template})" if chat_template else f"the chat template of {folder}"
    file = Path(chat_template) if chat_template else own if own.is_file() else None
    source = _read(file, where) if file else _default_of(settings.get("chat_template"))
    if source is None:
        return PlainTemplate()
    template = JinjaTemplate(source, _special_tokens(settings))
    try:
        with cpu_time_limit(SECONDS_TO_RENDER):  # the compiler evaluates constant expressions
            _ = template.compiled
    except (Exception, TimeLimitExceeded) as error:
        raise ConfigError(f"{where} is no Jinja template: {_reason(error)}; repair it or give another file.") from error
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


def _default_of(configured: Any) -> str | None:
    """Return the template of a tokenizer_config.json: text, or the one called "default" in a list of named ones."""
    if isinstance(configured, list):
        named = {entry.get("name"): entry.get("template") for entry in configured if isinstance(entry, dict)}
        configured = named.get("default")
    return configured if isinstance(configured, str) else None


def _special_tokens(settings: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return names and texts; a token is given as text or as an object with its text."""
    given = {name: settings.get(name) for name in SPECIAL_TOKENS}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in given.items()}
    return tuple((name, text) for name, text in texts.items() if isinstance(text, str))


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}, with which some templates mark answers; it is accepted and ignored."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _changed_answer(turn: int) -> DataError:
    return DataError(
        f"the chat template does not write the answer of turn {turn + 1} as it is given, once; give another "
        "--chat-template."
    )


def _reason(error: BaseException) -> str:
    """Describe a template's error in one line."""
    message = " ".join(str(error).split())
    known = isinstance(error, jinja2.TemplateError | TimeLimitExceeded) and message
    return message if known else f"{type(error).__name__}: {message}"


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Serialize to JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
