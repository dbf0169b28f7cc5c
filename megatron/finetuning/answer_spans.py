"""Location of the answers in the text of a Jinja chat template, by rendering the conversation turn by turn.

For the answer of turn t, with the turns before it alone:

    before     the turns before t
    prompt     the same with the generation prompt: what the model is given
    answered   the turns up to t: what the model is given and writes
    header, tail   what stands around the content of turn t in `answered`, from a rendering with a mark in its place

An answer begins where the prompt ends and ends with the token that ends the turn. Where a text of more turns begins
with `answered` up to there, it serves for that answer too. If a template writes an answer in another way once turns
follow, as one does that drops earlier reasoning, then the answer needs a text of its own, which is `answered`.

Some templates write the turns before an answer differently in `answered` and in `prompt`, such as a system message that
belongs to the last question. The model sees the prompt, so `answered` then takes it in place of its own beginning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, takewhile

from megatron.data.errors import DataError
from megatron.finetuning.conversations import Message
from megatron.finetuning.jinja_sandbox import Rendering, Span

Writer = Callable[[Sequence[Message], bool, bool], Rendering]
"""Renders turns: (messages, whether to add the generation prompt, whether the model is to think)."""

EMPTY_THOUGHT = re.compile(r"<think>\s*</think>")
THOUGHT_BEGINS = "<think>"
AROUND_THOUGHTS = re.compile(r"\s*(</?think>)\s*")


@dataclass(frozen=True)
class Answer:
    """A text, the spans of it that the model writes in turn `place`, from 1, and whether a token ends the turn."""

    place: int
    text: str
    spans: tuple[Span, ...]
    is_ended: bool = True

    def is_shown_in(self, text: str) -> bool:
        """Return whether a text begins like this one, up to the end of the answer."""
        return text.startswith(self.text[: self.spans[-1][1]])


@dataclass(frozen=True)
class Turns:
    """The turns up to and including an answer, and what renders them."""

    messages: tuple[Message, ...]
    render: Writer
    whole: str
    """The text of all turns, also those that follow."""

    end_of_text: str
    """The token with which some templates end a text, whatever turn is the last."""

    @property
    def answer(self) -> Message:
        """The answer."""
        return self.messages[-1]

    @property
    def place(self) -> int:
        """The number of the answer's turn, from 1."""
        return len(self.messages)

    @cached_property
    def answered(self) -> Rendering:
        """The turns with the answer, which follows the prompt."""
        written, text = self._written, self._after_prompt(self._written.text)
        moved = len(text) - len(written.text)
        return Rendering(text, tuple((begin + moved, end + moved) for begin, end in written.generated))

    @cached_property
    def _written(self) -> Rendering:
        """The turns with the answer, as the template writes them."""
        return self.render(self.messages, False, True)

    @cached_property
    def before(self) -> str:
        """The turns before the answer."""
        return self.render(self.messages[:-1], False, True).text

    @cached_property
    def prompt(self) -> str:
        """The turns before the answer and the prompt for it."""
        return self.render(self.messages[:-1], True, True).text

    @cached_property
    def is_announced(self) -> bool:
        """Whether the prompt says that an answer follows, in the way in which the answer is written."""
        return self.prompt != self.before and self.answered.text.startswith(self.prompt)

    @cached_property
    def closing(self) -> str:
        """The end of the text that belongs to no turn."""
        shared = self.before.removesuffix(self.end_of_text)
        closes = shared != self.before and not self.prompt.startswith(self.before) and self.prompt.startswith(shared)
        return self.end_of_text if closes else ""

    @property
    def start(self) -> str:
        """The text that the answer follows. DataError if the answer does not follow it."""
        start = self.prompt if self.is_announced else self.before.removesuffix(self.closing)
        if not self.answered.text.startswith(start):
            raise rewritten(self.place)
        return start

    @cached_property
    def _beginning(self) -> str | None:
        """What `answered` has in place of the prompt; None if it has the prompt, or if that is not to be found."""
        written, context = self._written.text, self.messages[:-1]
        shared = self.before.removesuffix(self.closing)
        if written.startswith((self.prompt, shared)) or not context or not self.prompt.startswith(shared):
            return None
        mark = _new_mark(written)
        header, *_ = self.render((*context, _with_mark(self.answer, mark)), False, True).text.split(mark)
        invitation = self.prompt.removeprefix(shared)
        if not (invitation.strip() and header.endswith(invitation)):
            question = shared.rfind(context[-1].text)
            last_turn = self.prompt[question:]
            if question < 0 or not context[-1].text or last_turn not in header:
                return None
            end = header.rfind(last_turn) + len(last_turn)
            if not invitation.strip() and header[end:].strip():
                return None  # what stands there may belong to the prompt
            header = header[:end]
        return header if written.startswith(header) else None

    def _after_prompt(self, written: str) -> str:
        """Return a text of the turns and the answer, or a mark in its place, that begins with the prompt."""
        beginning = self._beginning
        return written if beginning is None else self.prompt + written.removeprefix(beginning)

    def around(self, message: Message) -> tuple[str, str]:
        """Return what is written before and after the content of `message`, in place of the answer.

        A mark replaces the content, so words that header and content share cannot be confused. DataError if the mark
        is not rendered exactly once and unchanged.
        """
        mark = _new_mark(self.answered.text)
        marked = (*self.messages[:-1], replace(message, content=mark))
        header, *tails = self._after_prompt(self.render(marked, False, True).text).split(mark)
        if len(tails) != 1:
            raise changed(self.place)
        tail = tails[0].removesuffix(self.closing)
        self._check_end(marked, mark, tail.rstrip())
        return header, tail

    def _check_end(self, marked: Sequence[Message], mark: str, tail: str) -> None:
        """Raise DataError if a template writes the next prompt after every turn, so that answers seem to end with it.

        An end that differs only while no turn follows, such as another token, is the end.
        """
        ended = self.answered.text.rstrip()
        if not tail or (len(ended) < len(self.whole.rstrip()) and self.whole.startswith(ended)):
            return
        try:
            followed = self.render((*marked, Message("user", "next")), False, True).text
        except DataError:  # no turn may follow
            return
        backwards = zip(reversed(tail), reversed(self.before.rstrip()), strict=False)
        ends_every_turn = any(ours.isalnum() for ours, _ in takewhile(lambda pair: pair[0] == pair[1], backwards))
        if not followed.partition(mark)[2].startswith(tail) and ends_every_turn:
            raise DataError(
                f"the chat template ends turn {self.place} with {tail!r} only while no turn follows, so the end of the "
                "answer is not known; give another --chat-template."
            )


def find_answer(turns: Turns) -> Answer:
    """Find the characters that the assistant writes in the last turn. DataError if they cannot be located exactly."""
    if turns.answered.generated:
        return Answer(turns.place, turns.answered.text, _generated(turns))
    span, tail = _plain_answer(turns) if turns.answer.is_plain else _rich_answer(turns)
    return Answer(turns.place, turns.answered.text, (span,), is_ended=bool(tail))


def _generated(turns: Turns) -> tuple[Span, ...]:
    """Return the marked spans of the last turn: those after the text of the turns before it."""
    start = turns.start
    spans = tuple(span for span in turns.answered.generated if span[1] > len(start))
    if not spans:
        raise DataError(f"the chat template marks nothing of turn {turns.place} by {{% generation %}}; correct it.")
    _check_reasoning(turns, spans)
    written = "".join(turns.answered.text[begin:end] for begin, end in spans)
    if _comparable(turns.answer.text) not in _comparable(written):
        raise changed(turns.place)
    return spans


def _plain_answer(turns: Turns) -> tuple[Span, str]:
    """Find an answer that is text alone, and what the template writes after its content."""
    text = turns.answered.text.removesuffix(turns.closing)
    start, (header, tail) = turns.start, turns.around(turns.answer)
    if not turns.is_announced and not header.startswith(start):
        raise rewritten(turns.place)
    end = len(text) - len(tail)
    content = _comparable(turns.answer.text)
    if turns.is_announced and start.rstrip().endswith(THOUGHT_BEGINS):
        content = content.removeprefix(THOUGHT_BEGINS)
    # Some contents have no header, such as one with a thought where other contents get an empty thought.
    begins = (len(header), len(start)) if text.startswith(header) else (len(start),)
    begin = next((begin for begin in begins if _comparable(text[begin:end]) == content), None)
    if begin is None or len(start) > end or not text.endswith(tail):
        raise changed(turns.place)
    between = text[len(start) : begin].strip()
    if not between or (turns.is_announced and not _is_empty_thought(turns, between)):
        begin = len(start)  # the model writes what stands between the prompt and the content
    return (begin, _end(text, tail)), tail


def _rich_answer(turns: Turns) -> tuple[Span, str]:
    """Find an answer with reasoning or tool calls, and what the template writes after an answer.

    DataError if the text lacks any of it, or changes it.
    """
    text, start = turns.answered.text.removesuffix(turns.closing), turns.start
    header, tail = turns.around(Message(turns.answer.role, ""))
    begin = len(start)
    if not turns.is_announced:
        if not text.startswith(header) or len(header) < begin:
            raise changed(turns.place)
        begin = len(header)
    elif not turns.answer.reasoning.strip() and (empty := _empty_thought_at(turns, text, begin)):
        begin += len(empty)
    span = begin, _end(text, tail)
    _check_content(turns, text, span)
    _check_reasoning(turns, (span,))
    return span, tail


def _end(text: str, tail: str) -> int:
    """Return where the answer ends: with the closing token, or with whitespace if a template ends turns with that."""
    return len(text.rstrip()) if tail.strip() else len(text)


def _check_content(turns: Turns, text: str, span: Span) -> None:
    """Raise DataError unless the content of a rich answer is within its span, once and unchanged."""
    if not turns.answer.text:
        return
    header, tail = turns.around(turns.answer)
    content = text[len(header) : len(text) - len(tail)]
    is_whole = (
        text.startswith(header) and text.endswith(tail) and _comparable(content) == _comparable(turns.answer.text)
    )
    if not is_whole or not span[0] <= len(header) <= span[1]:
        raise changed(turns.place)


def _check_reasoning(turns: Turns, spans: tuple[Span, ...]) -> None:
    """Raise DataError unless the reasoning of an answer is written within its spans."""
    reasoning = turns.answer.reasoning.strip()
    if not reasoning:
        return
    mark = _new_mark(turns.answered.text)
    marked = turns.render((*turns.messages[:-1], replace(turns.answer, reasoning=mark)), False, True).text
    written = any(reasoning in turns.answered.text[begin:end] for begin, end in spans)
    if marked.count(mark) != 1 or not written:
        raise DataError(
            f"the chat template does not write the reasoning of turn {turns.place} once, as it is given; remove the "
            "reasoning or give another --chat-template."
        )


def _with_mark(answer: Message, mark: str) -> Message:
    """Put a mark in place of what an answer has first."""
    if answer.reasoning.strip():
        return replace(answer, reasoning=mark)
    return replace(answer, content=mark) if answer.text else Message(answer.role, mark)


def _is_empty_thought(turns: Turns, between: str) -> bool:
    return bool(EMPTY_THOUGHT.fullmatch(between)) or between == _closed_thought(turns).strip()


def _empty_thought_at(turns: Turns, text: str, begin: int) -> str:
    """Return the empty thought that a text has at `begin`, or nothing."""
    known = EMPTY_THOUGHT.match(text[begin : begin + 64].lstrip())
    closed = _closed_thought(turns)
    if closed and text.startswith(closed, begin):
        return closed
    return text[begin : text.index(known[0], begin) + len(known[0])] if known else ""


def _closed_thought(turns: Turns) -> str:
    """Return what the prompt adds for a model that is not to think."""
    prompt = turns.render(turns.messages[:-1], True, False).text
    return prompt.removeprefix(turns.prompt) if prompt.startswith(turns.prompt) else ""


def _comparable(text: str) -> str:
    """Return a text without the whitespace around it and around its thoughts, which templates write their own way."""
    return AROUND_THOUGHTS.sub(r"\1", text.strip())


def _new_mark(text: str) -> str:
    return next(mark for number in count() if (mark := f"aNsWeR-{number}-") not in text)


def rewritten(place: int, remedy: str = "give another --chat-template") -> DataError:
    """Return the error for an answer that the template writes differently once turns follow."""
    return DataError(
        f"the chat template writes turn {place} in another way when turns follow, so that what the model "
        f"would see there is not what it is trained on; {remedy}."
    )


def changed(place: int) -> DataError:
    """Return the error for an answer that is not found in the text."""
    return DataError(
        f"the chat template does not write the answer of turn {place} as it is given, once; give another "
        "--chat-template."
    )
