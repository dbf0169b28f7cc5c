"""Tokenizers of every kind, with the chat templates that go with them."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megatron.config import TokenizerConfig
from megatron.config.finetuning import FinetuningConfig
from megatron.finetuning.chat_template import ChatTemplate, find_template
from megatron.finetuning.encoding import ConversationEncoder
from megatron.tokenizer import build_tokenizer
from megatron.tokenizer.hugging_face import HFTokenizer
from tests.unit.tokenizer.conftest import bpe_files, sentencepiece_file  # noqa: F401

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}"
    "{{ ' ' + message.content | trim + ' ' + eos_token }}{% endgeneration %}{% else %}"
    "{{ '[INST] ' + message.content | trim + ' [/INST]' }}{% endif %}{% endfor %}"
)
MARKUP = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|return|>", "<|channel|>", "<|message|>"),
    *("<|eot_id|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@dataclass(frozen=True)
class Chat:
    """A tokenizer as the flags name it, its template and what encodes with them."""

    flags: TokenizerConfig
    template: ChatTemplate
    encoder: ConversationEncoder


def chat_of(flags: TokenizerConfig) -> Chat:
    tokenizer = build_tokenizer(
        flags.tokenizer_type, flags.vocab_file, flags.merge_file, flags.tokenizer_model, flags.vocab_size
    )
    template = find_template(flags, FinetuningConfig())
    return Chat(flags, template, ConversationEncoder(tokenizer, template))


def write_hf_folder(folder: Path, bpe: tuple[Path, Path], template: str | None) -> TokenizerConfig:
    """Write a byte-level tokenizer.json with special tokens, and the template in tokenizer_config.json."""
    tokenizer = tokenizers.Tokenizer(models.BPE.from_file(*map(str, bpe)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | ({"chat_template": template} if template else {}))
    )
    return TokenizerConfig(tokenizer_type="HFTokenizer", tokenizer_model=str(folder))


KINDS = ("gpt2", "sentencepiece", "hf plain", "hf chatml", "hf llama2")


@pytest.fixture
def make_chat(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], Chat]:
    """Return a function that makes a chat of a kind."""

    def make(kind: str) -> Chat:
        if kind == "sentencepiece":
            model = str(request.getfixturevalue("sentencepiece_file"))
            return chat_of(TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=model))
        bpe = request.getfixturevalue("bpe_files")
        if kind == "gpt2":
            return chat_of(TokenizerConfig(vocab_file=str(bpe[0]), merge_file=str(bpe[1])))
        template = {"hf chatml": CHATML, "hf llama2": LLAMA2}.get(kind)
        return chat_of(write_hf_folder(tmp_path / "hf", bpe, template))

    return make


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    """Return a tokenizer of bytes and special tokens alone."""
    folder = tmp_path_factory.mktemp("bytes")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}
    file = tokenizers.Tokenizer(models.BPE(symbols, []))
    file.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    file.decoder = decoders.ByteLevel()
    file.add_special_tokens(MARKUP)
    file.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return HFTokenizer(folder)


def ids_of(text: str) -> list[int]:
    """Compute the expected tokens of a text without the tokenizer: its bytes, and ids from 256 for special tokens."""
    parts = re.split(f"({'|'.join(map(re.escape, MARKUP))})", text)
    return [token for part in parts for token in ([256 + MARKUP.index(part)] if part in MARKUP else part.encode())]


Segments = list[tuple[str, bool]]
"""Texts, and whether the model writes them."""


def masked(segments: Segments) -> tuple[list[int], list[bool]]:
    """Return the expected tokens of the segments, and which of them count."""
    pairs = [(token, counts) for text, counts in segments for token in ids_of(text)]
    return [token for token, _ in pairs], [counts for _, counts in pairs]
