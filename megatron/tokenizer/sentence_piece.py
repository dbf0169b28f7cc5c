"""SentencePiece models, as LLaMA 1 and 2 use them."""

from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from megatron.tokenizer.errors import TokenizerError
from megatron.tokenizer.text import valid_unicode

# Fields of the library's ModelProto: the training and the normalization settings; every model ends with both.
TRAINER_SPEC, NORMALIZER_SPEC = 2, 3
WITH_LENGTH = 2
END_OF_DOCUMENT_PIECES = ("<eod>", "<EOD>", "<|endoftext|>")


class SentencePieceTokenizer:
    """A SentencePiece model file; its end-of-sentence piece ends a document.

    Text that the model's normalization drops is lost. Control pieces that a text spells out are ordinary text.
    """

    def __init__(self, model_file: Path) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        except Exception as error:
            raise TokenizerError(
                f"--tokenizer-model ({model_file}) is not a SentencePiece model: {error}; give a tokenizer.model file."
            ) from error
        # Without them the library silently splits text differently.
        if not {TRAINER_SPEC, NORMALIZER_SPEC} <= _fields_of(model_file.read_bytes()):
            raise TokenizerError(
                f"--tokenizer-model ({model_file}) ends before the settings that end a SentencePiece model; "
                "fetch the file again."
            )
        self.vocab_size = int(self._processor.get_piece_size())
        self.eod = self._find_eod(model_file)

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode_as_ids(valid_unicode(text))
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode_ids(list(ids))
        return text

    def _find_eod(self, model_file: Path) -> int:
        candidates = [self._processor.eos_id()]
        candidates += [self._processor.piece_to_id(piece) for piece in END_OF_DOCUMENT_PIECES]
        for candidate in candidates:
            # A piece of another kind, such as a user-defined symbol, would match the text of a document.
            if candidate >= 0 and self._processor.is_control(candidate):
                return int(candidate)
        raise TokenizerError(
            f"--tokenizer-model ({model_file}) has no end-of-sentence piece and none of "
            f"{', '.join(END_OF_DOCUMENT_PIECES)} that is a control piece, which no text can spell; give a model that "
            "was trained with one."
        )


def _fields_of(message: bytes) -> set[int]:
    """Return the numbers of the leading fields of a protobuf message, up to the first that is not length-delimited."""
    fields, place = set(), 0
    while place < len(message):
        key, place = _varint(message, place)
        if key & 7 != WITH_LENGTH:  # an extension, after all fields that the library defines
            break
        length, place = _varint(message, place)
        fields.add(key >> 3)
        place += length
    return fields


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """Decode a protobuf varint (seven bits a byte, least significant first); return it and the position after it."""
    number = shift = 0
    while message[place] & 0x80:
        number |= (message[place] & 0x7F) << shift
        place, shift = place + 1, shift + 7
    return number | message[place] << shift, place + 1
