"""Tokenizers from any tokenizer.json of the Hugging Face tokenizers library, without transformers."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from megatron.core.json_text import parse_json
from megatron.tokenizer.errors import TokenizerError
from megatron.tokenizer.text import encode_text

END_OF_DOCUMENT_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


class HFTokenizer:
    """A tokenizer.json, or a folder with one; the eos_token of the tokenizer_config.json next to it ends a document.

    Unlike in transformers, special tokens that a document spells out are ordinary text.
    """

    def __init__(self, model: Path) -> None:
        path = model / "tokenizer.json" if model.is_dir() else model
        if not path.is_file():
            raise TokenizerError(
                f"--tokenizer-model ({model}) is a folder without tokenizer.json; give one that has it, or use "
                "GPT2BPETokenizer or SentencePieceTokenizer for other formats."
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise TokenizerError(
                f"--tokenizer-model ({path}) is not a tokenizer.json: {error}; give the file of the Hugging Face model."
            ) from error
        # Settings for batches of short texts would truncate or pad documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # encodes them as ordinary text
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eod = self._find_eod(path)

    def tokenize(self, text: str) -> list[int]:
        return encode_text(self._tokenizer, text)

    def tokenize_markup(self, text: str) -> list[int]:
        """Encode a text in which special tokens are special: the output of a chat template."""
        return encode_text(self._markup, text)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def _markup(self) -> tokenizers.Tokenizer:
        markup = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        markup.encode_special_tokens = False
        return markup

    def _find_eod(self, path: Path) -> int:
        configured = _configured_eos(path.with_name("tokenizer_config.json"))
        candidates = (configured,) if configured else END_OF_DOCUMENT_TOKENS
        for candidate in candidates:
            eod = self._tokenizer.token_to_id(candidate)
            if eod is not None:
                self._refuse_if_text_spells(candidate, eod, path)
                return eod
        raise TokenizerError(
            f"--tokenizer-model ({path}) has no end-of-document token; looked for {', '.join(candidates)}; name an "
            "eos_token of the vocabulary in tokenizer_config.json beside it."
        )

    def _refuse_if_text_spells(self, token: str, eod: int, path: Path) -> None:
        """Raise TokenizerError if text can spell the token: a vocabulary may hold it as a whole word."""
        if eod in self.tokenize(token):
            raise TokenizerError(
                f"--tokenizer-model ({path}) reads the text {token!r} as the end of a document, so that a document "
                "could spell it; mark it as special in the file's added_tokens, or give a tokenizer with a BPE model."
            )


def _configured_eos(path: Path) -> str | None:
    """Read the eos_token of a tokenizer_config.json, a string or an object with its text; None if there is none."""
    if not path.is_file():
        return None
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} is no readable JSON: {error}; repair or remove it.") from error
    token = config.get("eos_token") if isinstance(config, dict) else None
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
