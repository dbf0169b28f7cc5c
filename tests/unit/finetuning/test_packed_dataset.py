"""Samples of several conversations: documents, padding and labels where they belong; epochs; the cache on the disk."""

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megatron.config import TokenizerConfig
from megatron.config.finetuning import FinetuningConfig
from megatron.core.sequence_layout import SequenceLayout
from megatron.data.batch import Sample, slice_batch
from megatron.data.errors import DataError
from megatron.finetuning.chat_template import Part, PlainTemplate
from megatron.finetuning.conversations import Conversation
from megatron.finetuning.encoding import ConversationEncoder, EncodedConversation
from megatron.finetuning.packed_dataset import Conversations, PackedDataset, choose
from megatron.finetuning.reading_summary import ReadingSummary, SummaryCounts
from megatron.finetuning.token_cache import StoredConversation, TokenCache, tokenized, tokenizer_fingerprint
from megatron.tokenizer.null import NullTokenizer

END, PADDING, LENGTH = 100, 99, 16
ENCODER = ConversationEncoder(NullTokenizer(END), PlainTemplate(names_roles=False))
# prompt, response; with the end 6, 4, 9, 3 and 7 tokens
PAIRS = [("1 2 3", "4 5"), ("6 7", "8"), ("9 10 11", "12 13 14 15 16"), ("17", "18"), ("19 20 21 22", "23 24")]


def write(path: Path, pairs: list[tuple[str, str]] = PAIRS) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in pairs))
    return path


def cache_of(path: Path) -> TokenCache:
    return tokenized(path, path.parent / "cache", ENCODER, "tokenizer", FinetuningConfig())


@pytest.fixture
def conversations(tmp_path: Path) -> Conversations:
    """Two files of five conversations in all."""
    return Conversations([cache_of(write(tmp_path / "a", PAIRS[:3])), cache_of(write(tmp_path / "b", PAIRS[3:]))])


def dataset_of(conversations: Conversations, num_samples: int, seed: int = 0) -> PackedDataset:
    return PackedDataset(conversations, np.arange(len(conversations)), num_samples, LENGTH, seed, PADDING)


def loss_mask(sample: Sample) -> np.ndarray:
    """Which of the labels count, bool [S]."""
    mask = np.zeros(LENGTH, bool)
    assert sample.loss_spans is not None
    for start, stop in sample.loss_spans.tolist():
        assert not mask[start:stop].any()
        mask[start:stop] = True
    return mask


def test_a_sample_holds_whole_conversations_and_counts_their_answers_alone(conversations: Conversations) -> None:
    dataset = dataset_of(conversations, 2)
    found = []
    for sample in (dataset[i] for i in range(len(dataset.packing))):
        assert sample.documents is not None
        labels, answers, stop = sample.tokens[1:], [], 0
        for start, end in sample.documents:
            assert start == stop
            # The last document's last token may be a label alone.
            stop = end
            tokens = sample.tokens[start : end + (end == LENGTH)].tolist()
            found.append(tuple(token for token in tokens))
            prompt, response = next(pair for pair in PAIRS if pair[0].split()[0] == str(tokens[0]))
            assert tokens == [*map(int, prompt.split()), *map(int, response.split()), END]
            answers += [*map(int, response.split()), END]
        assert labels[loss_mask(sample)].tolist() == answers
        assert not loss_mask(sample)[stop:].any()
    assert len(set(found)) == len(found) == len(PAIRS)


def test_a_conversation_as_long_as_a_sample_fills_it(tmp_path: Path) -> None:
    words = [str(i) for i in range(LENGTH)]  # and the end: one more than the inputs
    conversations = Conversations([cache_of(write(tmp_path / "a", [(" ".join(words[:4]), " ".join(words[4:]))]))])
    sample = dataset_of(conversations, 1)[0]
    assert sample.tokens[:].tolist() == [*range(LENGTH), END]
    assert sample.documents == ((0, LENGTH),)
    assert loss_mask(sample).tolist() == [False] * 3 + [True] * (LENGTH - 3)


def test_a_conversation_that_begins_with_an_answer_does_not_count_its_first_token(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text(json.dumps({"messages": [{"role": "assistant", "content": "1 2"}]}) + "\n")
    line = path.read_text()
    path.write_text(line + line)
    sample = dataset_of(Conversations([cache_of(path)]), 1)[0]
    assert loss_mask(sample).tolist() == [True, True, False, True, True] + [False] * 11


def test_slices_of_a_sample_are_those_of_the_whole(conversations: Conversations) -> None:
    dataset = dataset_of(conversations, 2)
    for tokens in (dataset[0].tokens, dataset[1].tokens):
        whole = tokens[:]
        assert (len(tokens), len(whole)) == (LENGTH + 1, LENGTH + 1)
        for start in range(LENGTH + 1):
            for stop in range(start, LENGTH + 2):
                np.testing.assert_array_equal(tokens[start:stop], whole[start:stop])


@pytest.mark.parametrize("block_tokens", [1, 2, 3, 1000])
def test_answers_are_found_whatever_is_read_at_a_time(monkeypatch: pytest.MonkeyPatch, block_tokens: int) -> None:
    monkeypatch.setattr("megatron.data.tokens.BLOCK_TOKENS", block_tokens)
    for answers in range(2**6):
        is_answer = np.array([bool(answers >> k & 1) for k in range(6)])
        stored = StoredConversation(np.where(is_answer, 5, -6).astype(np.int32))
        for num_tokens in range(1, 8):
            labels = is_answer[1:num_tokens]
            found = np.zeros(len(labels), bool)
            for start, stop in stored.loss_spans(num_tokens).tolist():
                found[start:stop] = True
            assert found.tolist() == labels.tolist()


def test_a_batch_of_two_million_tokens_uses_no_memory_but_its_own() -> None:
    length, lengths = 2**21, np.full(40, 60_000)  # 34 of them and padding
    stored = np.where(np.arange(lengths.sum()) % 1000 < 400, 7, -8).astype(np.int32)
    cache = TokenCache(Path("a"), stored, np.stack((np.cumsum(lengths), np.arange(40)), axis=1))
    dataset = PackedDataset(Conversations([cache]), np.arange(40), 2, length, 0, PADDING)
    layout = SequenceLayout(length, 2**17, 4)
    tracemalloc.start()  # sees numpy's arrays, and not torch's tensors, which the batch consists of
    batch = slice_batch([dataset[0]], layout, 1, pin=False)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert set(batch.tokens.unique().tolist()) <= {7, PADDING}
    assert most < 4 * 2**20 < batch.tokens.nbytes + batch.labels.nbytes


def test_every_epoch_takes_every_sequence_in_another_order(tmp_path: Path) -> None:
    pairs = [(" ".join(["1"] * 10), str(i)) for i in range(30)]  # one to a sequence
    conversations = Conversations([cache_of(write(tmp_path / "a", pairs))])
    dataset = dataset_of(conversations, 90)
    answers = [int(dataset[i].tokens[10:11][0]) for i in range(90)]
    epochs = [answers[:30], answers[30:60], answers[60:]]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = dataset_of(conversations, 61)
    assert [int(again[i].tokens[10:11][0]) for i in (60, 3, 31)] == [answers[i] for i in (60, 3, 31)]
    assert [int(dataset_of(conversations, 30, seed=1)[i].tokens[10:11][0]) for i in range(30)] != epochs[0]


def test_the_share_of_padding_is_that_of_the_sequences(conversations: Conversations) -> None:
    dataset = dataset_of(conversations, 2)
    assert len(dataset.packing) == 2
    assert dataset.padding_share == pytest.approx(1 - 29 / 34)


LONG = [("1 2", "3"), ("4 5", " ".join(["6"] * LENGTH)), (" ".join(["7"] * (LENGTH + 1)), "8")]


def test_a_conversation_that_is_too_long_is_refused_by_name(tmp_path: Path) -> None:
    conversations = Conversations([cache_of(write(tmp_path / "a", LONG))])
    with pytest.raises(DataError, match=r"a, line 2: a conversation of 19 tokens is longer than --seq-length \(16\)"):
        choose(conversations, range(3), LENGTH, "error", "train")


def test_a_conversation_that_is_too_long_is_cut_or_left_out(tmp_path: Path) -> None:
    conversations = Conversations([cache_of(write(tmp_path / "a", LONG))])
    assert choose(conversations, range(3), LENGTH, "skip", "train").tolist() == [0]
    cut = choose(conversations, range(3), LENGTH, "truncate", "train")
    assert cut.tolist() == [0, 1]  # nothing of the third answer would be left
    dataset = PackedDataset(conversations, cut, 2, LENGTH, 0, PADDING)
    longest = next(sample for sample in (dataset[0], dataset[1]) if sample.tokens[:1] == 4)
    assert longest.tokens[:].tolist() == [4, 5] + [6] * (LENGTH - 1)
    with pytest.raises(DataError, match="no conversation that fits, of 1"):
        choose(conversations, range(1, 2), LENGTH, "skip", "train")


def test_a_file_is_tokenized_once_and_again_when_it_changes(tmp_path: Path) -> None:
    path = write(tmp_path / "a")
    with ThreadPoolExecutor(4) as pool:
        assert {len(cache) for cache in pool.map(cache_of, [path] * 4)} == {5}
    folders = set((tmp_path / "cache").glob("*-conversations"))
    (folder,) = folders
    written = os.stat(folder / "tokens.bin").st_mtime_ns
    cache_of(path)
    assert os.stat(folder / "tokens.bin").st_mtime_ns == written
    write(path, PAIRS[:2])
    assert len(cache_of(path)) == 2
    assert len(set((tmp_path / "cache").glob("*-conversations"))) == 2


def test_an_edit_that_keeps_size_and_time_is_seen_and_a_copy_is_not_tokenized_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a")
    status = path.stat()
    cache_of(path)
    copied = path.with_name("copy")
    shutil.copy(path, copied)
    assert cache_of(copied).path == copied
    assert len(list((tmp_path / "cache").glob("*-conversations"))) == 1
    path.write_text(path.read_text().replace("18", "19"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert cache_of(path)[3].tokens(0, 3).tolist() == [17, 19, END]


def test_a_file_that_changes_while_it_is_tokenized_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a")

    class Growing(PlainTemplate):
        def render(self, conversation: Conversation) -> list[list[Part]]:
            path.write_text(path.read_text() + "\n")
            return super().render(conversation)

    encoder = ConversationEncoder(NullTokenizer(END), Growing(names_roles=False))
    with pytest.raises(DataError, match="a was changed while it was tokenized; run again"):
        tokenized(path, tmp_path / "cache", encoder, "tokenizer", FinetuningConfig())
    assert not list((tmp_path / "cache").glob("*-conversations"))


@pytest.mark.parametrize("name", ["tokens.bin", "samples.npy", "summary.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: None,
        lambda whole: b"",
        lambda whole: whole[:-40],
        lambda whole: whole + bytes(4),
        lambda whole: whole[:9] + bytes([whole[9] ^ 4]) + whole[10:],
    ],
    ids=["missing", "empty", "cut short", "longer", "a bit changed"],
)
def test_a_damaged_cache_is_rebuilt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[bytes], bytes | None]
) -> None:
    path = write(tmp_path / "a")
    whole = [cache_of(path)[k].stored.tolist() for k in range(5)]
    (file,) = (tmp_path / "cache").glob(f"*/{name}")
    content = damage(file.read_bytes())
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    again = cache_of(path)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{file.parent} is cut short or was changed" in caplog.text
    assert [again[k].stored.tolist() for k in range(5)] == whole
    assert len(again.tokens) == sum(map(len, whole))
    caplog.clear()
    cache_of(path)
    assert caplog.text == ""


def test_a_line_in_error_leaves_no_cache(tmp_path: Path) -> None:
    path = write(tmp_path / "a", [("1", "2"), ("1", "x")])
    with pytest.raises(DataError, match=r"line 2: .*'x'"):
        cache_of(path)
    assert [file for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"] == []


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no conversation"):
        cache_of(write(tmp_path / "a", []))


MIXED = [
    {"prompt": "1 2", "response": "3"},
    {"conversations": [{"from": "human", "value": "4"}, {"from": "gpt", "value": "5 6"}]},
    {"messages": []},
    {"prompt": "x", "response": "9"},
    {"prompt": "y", "response": "9"},
]


def test_what_is_left_out_is_reported_by_every_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a"
    path.write_text("".join(json.dumps(record) + "\n" for record in MIXED))
    with pytest.raises(DataError, match="a, line 3: no turn of the assistant"):
        cache_of(path)
    caplog.set_level("INFO", "megatron")
    skipping = FinetuningConfig(refused_conversations="skip")
    for _ in range(2):
        caplog.clear()
        cache = tokenized(
            path, tmp_path / "cache", ENCODER, "tokenizer", FinetuningConfig(refused_conversations="skip")
        )
        assert [cache.where(index) for index in range(len(cache))] == [f"{path}, line 1", f"{path}, line 2"]
        report = [record.getMessage() for record in caplog.records if "tokenizing" not in record.getMessage()]
        assert report[0] == (
            f"{path} (JSON lines): conversations 1 prompt_completion, 1 sharegpt; 2 samples of 8 tokens, 5 trained "
            "(62.5 %); 3 left out"
        )
        assert report[1].startswith(f"left out 1 of {path}; the first, line 3: no turn of the assistant")
        assert report[2].startswith(f"left out 2 of {path}; the first, line 4: ")
        assert len(report) == 3
    write(path, [("x", "y")])
    with pytest.raises(DataError, match="a: all 1 conversations were left out; the first, line 1: "):
        tokenized(path, tmp_path / "cache", ENCODER, "tokenizer", skipping)


def test_answers_that_are_split_skipped_or_not_ended_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    counts = SummaryCounts(Path("a"), "JSON lines")
    tokens, is_answer = np.arange(4, dtype=np.int32), np.array([False, True, True, False])
    sample = EncodedConversation(tokens, is_answer, num_open=1, num_skipped=2)
    counts.take("messages", [sample, sample])
    caplog.set_level("INFO", "megatron")
    ReadingSummary.parse(Path("b"), counts.summary().to_json()).log()
    report = [record.getMessage() for record in caplog.records]
    assert report[0] == (
        "b (JSON lines): conversations 1 messages; 2 samples of 8 tokens, 4 trained (50.0 %); 0 left out"
    )
    expected = ("so 1 conversations became", "4 answers are left out", "2 answers end")
    for line, words in zip(report[1:], expected, strict=True):
        assert words in line


def test_a_stated_format_is_that_of_every_line(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("".join(json.dumps(record) + "\n" for record in MIXED[:2]))
    with pytest.raises(DataError, match="line 2: no key 'prompt', but conversations; correct the line or"):
        tokenized(path, tmp_path / "cache", ENCODER, "x", FinetuningConfig(chat_format="prompt_completion"))


def test_another_tokenizer_has_another_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    prints = set()
    for content in ("one", "two"):
        file.write_text(content)
        prints.add(tokenizer_fingerprint(TokenizerConfig(tokenizer_type="HFTokenizer", tokenizer_model=str(tmp_path))))
    prints.add(tokenizer_fingerprint(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=4)))
    assert len(prints) == 3
