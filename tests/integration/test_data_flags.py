"""Every form of the flags that name the data leads to the documents that it names."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron.arguments import parse_args
from megatron.config.checks import validate
from megatron.data.indexed_dataset import IndexedDatasetWriter
from pretrain_gpt import datasets
from tests.integration.runs import base_flags

NUM_DOCUMENTS, DOCUMENT_TOKENS = 20, 200
VOCAB_SIZE = 128

Tokens = dict[str, set[int]]


@pytest.fixture
def prefixes(tmp_path: Path) -> dict[str, Path]:
    """Return datasets a, b and c; document k of dataset d holds nothing but the token k + 20 d."""
    made = {}
    for number, name in enumerate("abc"):
        made[name] = tmp_path / name
        with IndexedDatasetWriter(made[name], np.uint16) as writer:
            for document in range(NUM_DOCUMENTS):
                writer.add_document([document + NUM_DOCUMENTS * number] * DOCUMENT_TOKENS)
    return made


@pytest.fixture
def tokens_of(prefixes: dict[str, Path]) -> Callable[[str], Tokens]:
    """Return what tells, for flags that name the datasets, which tokens each part has."""

    def tokens(flags: str) -> Tokens:
        words = base_flags(Path("unused"))
        start = words.index("--data-path")
        words[start : start + 4] = ["--train-iters", "2", *(str(prefixes.get(word, word)) for word in flags.split())]
        config = parse_args(words)
        validate(config, 1, "cpu")
        parts = datasets(config, (300, 30, 30), VOCAB_SIZE)
        return {
            name: set(np.concatenate([part[k][:] for k in range(len(part))]).tolist())
            for name, part in zip(("train", "valid", "test"), parts, strict=True)
            if part is not None
        }

    return tokens


def documents(name: str, start: int = 0, stop: int = NUM_DOCUMENTS) -> set[int]:
    first = NUM_DOCUMENTS * "abc".index(name)
    return set(range(first + start, first + stop))


def test_one_prefix_is_split_by_documents(tokens_of: Callable[[str], Tokens]) -> None:
    parts = {"train": documents("a", 0, 10), "valid": documents("a", 10, 15), "test": documents("a", 15)}
    assert tokens_of("--data-path a --split 2,1,1") == parts


def test_weights_and_prefixes_blend_and_each_is_split(tokens_of: Callable[[str], Tokens]) -> None:
    found = tokens_of("--data-path 3 a 1 c --split 80,10,10")
    assert found["train"] == documents("a", 0, 16) | documents("c", 0, 16)
    assert found["valid"] == documents("a", 16, 18) | documents("c", 16, 18)
    assert found["test"] == documents("a", 18) | documents("c", 18)


def test_parts_of_their_own_are_used_whole(tokens_of: Callable[[str], Tokens]) -> None:
    flags = "--train-data-path 0.5 a 0.5 b --valid-data-path c"
    assert tokens_of(flags) == {"train": documents("a") | documents("b"), "valid": documents("c")}
    assert tokens_of(f"{flags} --test-data-path b")["test"] == documents("b")


def test_orders_are_kept_where_the_flag_says_and_a_changed_dataset_gets_others(
    tokens_of: Callable[[str], Tokens], prefixes: dict[str, Path], tmp_path: Path
) -> None:
    flags = f"--data-path a --split 1,0,0 --data-cache-path {tmp_path / 'cache'}"
    assert tokens_of(flags) == {"train": documents("a")}
    kept = set((tmp_path / "cache").iterdir())
    assert len(kept) == 1
    assert not Path(f"{prefixes['a']}_cache").exists()
    assert tokens_of(flags) == {"train": documents("a")}
    assert set((tmp_path / "cache").iterdir()) == kept
    with IndexedDatasetWriter(prefixes["a"], np.uint16) as writer:
        for token in range(5):
            writer.add_document([100 + token] * 1000)
    assert tokens_of(flags) == {"train": set(range(100, 105))}
    assert len(set((tmp_path / "cache").iterdir())) == 2
