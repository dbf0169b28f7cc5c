"""Tokenization of conversations, with a mask of the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise

import numpy as np
import numpy.typing as npt

from megatron.data.errors import DataError
from megatron.finetuning.chat_template import ChatTemplate, JinjaTemplate, Part, Sample
from megatron.finetuning.conversations import Segments, TokenRecord, TrainingRecord
from megatron.tokenizer import Tokenizer
from megatron.tokenizer.hugging_face import HFTokenizer

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class EncodedConversation:
    """tokens int32 [L], is_answer bool [L]: the tokens that count.

    `num_open` answers are ended by no token, and `num_skipped` count nowhere, since the template rewrites them.
    """

    tokens: npt.NDArray[np.int32]
    is_answer: npt.NDArray[np.bool_]
    num_open: int = 0
    num_skipped: int = 0


@dataclass(frozen=True)
class ConversationEncoder:
    """Renders conversations with a template and tokenizes each part of the text at once."""

    tokenizer: Tokenizer
    template: ChatTemplate

    def encode(self, record: TrainingRecord) -> list[EncodedConversation]:
        """Tokenize a record, as one or more samples. DataError if a token belongs both to an answer and to the text
        around it, or if a sample has no token to learn."""
        if isinstance(record, TokenRecord):
            return [self._checked(*self._known(record))]
        if isinstance(record, Segments):
            return [self._checked(*self._encode_segments(record))]
        return [
            replace(
                self._checked(*self._encode(sample)),
                num_open=sum(part.num_open for part in sample),
                num_skipped=sum(part.num_skipped for part in sample),
            )
            for sample in self.template.render(record)
        ]

    def _encode(self, sample: Sample) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        is_answer: list[bool] = []
        for part in sample:
            tokens, bounds = _tokens_and_bounds(self._tokenize, part)
            marks = [False] * len(tokens)
            for first, last in zip(bounds[::2], bounds[1::2], strict=True):
                marks[first:last] = [True] * (last - first)
            ids += [*tokens, self.tokenizer.eod] if part.ends else tokens
            is_answer += [*marks, part.ends_answer] if part.ends else marks
        return ids, is_answer

    def _encode_segments(self, record: Segments) -> tuple[list[int], list[bool]]:
        """Tokenize each segment by itself, so that no token crosses its bounds; special tokens are read as such."""
        ids: list[int] = []
        is_answer: list[bool] = []
        for text, counts in record.texts:
            tokens = self._tokenize_markup(text)
            ids += tokens
            is_answer += [counts] * len(tokens)
        return ids, is_answer

    def _known(self, record: TokenRecord) -> tuple[Sequence[int], Sequence[bool]]:
        unknown = next((token for token in record.tokens if not 0 <= token < self.tokenizer.vocab_size), None)
        if unknown is not None:
            raise DataError(
                f"the token {unknown} is not in the vocabulary of {self.tokenizer.vocab_size}; tokenize with the same "
                "tokenizer."
            )
        return record.tokens, record.is_answer

    def _checked(self, tokens: Sequence[int], is_answer: Sequence[bool]) -> EncodedConversation:
        if not any(is_answer[1:]):
            raise DataError("its answers have no token that others precede; give a prompt before the answer.")
        return EncodedConversation(np.array(tokens, np.int32), np.array(is_answer, np.bool_))

    def _tokenize(self, text: str) -> list[int]:
        """Tokenize a part, which may hold special tokens of a Jinja template."""
        return (
            self._tokenize_markup(text) if isinstance(self.template, JinjaTemplate) else self.tokenizer.tokenize(text)
        )

    def _tokenize_markup(self, text: str) -> list[int]:
        """Tokenize a text that spells out special tokens, where the tokenizer can."""
        tokenizer = self.tokenizer
        return tokenizer.tokenize_markup(text) if isinstance(tokenizer, HFTokenizer) else tokenizer.tokenize(text)


def _tokens_and_bounds(tokenize: Tokenize, part: Part) -> tuple[list[int], list[int]]:
    """Return (the tokens of the whole text, the tokens at which each answer begins and ends)."""
    cuts = list(chain.from_iterable(part.answers))
    tokens = tokenize(part.text)
    pieces = [tokenize(part.text[start:stop]) for start, stop in pairwise([0, *cuts, len(part.text)])]
    if list(chain.from_iterable(pieces)) == tokens:
        return tokens, list(accumulate(map(len, pieces[:-1])))
    # The start of a piece may be tokenized differently in mid-text, as with SentencePiece's leading space.
    return tokens, [_bound(tokenize, part.text, tokens, cut) for cut in cuts]


def _bound(tokenize: Tokenize, text: str, tokens: list[int], cut: int) -> int:
    before = tokenize(text[:cut])
    if tokens[: len(before)] != before:
        around = text[max(cut - 20, 0) : cut + 20]
        raise DataError(
            f"in {around!r} a token holds the bound of an answer and what stands beyond it, so the loss cannot be on "
            "the answer alone; let the chat template put a special token or a line break there."
        )
    return len(before)
