"""Tokenizers of every kind, with the chat templates that go with them."""

import json
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
