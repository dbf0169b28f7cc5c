"""What a user can get wrong ends at once: one line that says what to do, exit code 2, and not a file written."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.corpus import copy_corpus, truncate, write_corpus
from tests.integration.runs import FPDT, GPT, KEPT, OFFLOADED, Ended, Ranks, base_flags


@dataclass(frozen=True)
class Case:
    """Flags that break a small LLaMA run, and words that the answer must hold. FOLDER is the case's own folder."""

    name: str
    flags: list[str]
    words: list[str]
    prepare: Callable[[Path, Path], None] = lambda corpus, folder: None


def _cut(ending: str) -> Callable[[Path, Path], None]:
    def prepare(corpus: Path, folder: Path) -> None:
        copy_corpus(corpus, folder / "cut")
        truncate(folder / f"cut{ending}", 8)

    return prepare


def _write_few_documents(corpus: Path, folder: Path) -> None:
    write_corpus(folder / "few", num_documents=4)


def _write_misspelt_json(corpus: Path, folder: Path) -> None:
    (folder / "ds.json").write_text('{"zero_optimisation": {}}')


CASES = [
    Case("unknown flag", ["--seq-lenght", "64"], ["--seq-lenght", "did you mean --seq-length?"]),
    Case("unknown tokenizer", ["--tokenizer-type", "WordTokenizer"], ["'WordTokenizer'", "GPT2BPETokenizer"]),
    Case("missing data", ["--data-path", "FOLDER/absent"], ["FOLDER/absent.idx is missing", "preprocess_data.py"]),
    Case("truncated index", ["--data-path", "FOLDER/cut"], ["FOLDER/cut.idx is truncated", "again"], _cut(".idx")),
    Case("truncated tokens", ["--data-path", "FOLDER/cut"], ["FOLDER/cut.bin is truncated", "again"], _cut(".bin")),
    Case(
        "too little data",
        ["--data-path", "FOLDER/few", "--seq-length", "4096"],
        ["the train part of FOLDER/few has", "tokens", "one sample takes 4097"],
        _write_few_documents,
    ),
    Case(
        "token beyond the vocabulary",
        ["--vocab-size", "40"],
        ["is outside the vocabulary, ids 0 to 40", "tokenizer"],
    ),
    Case(
        "more chunks than the host may hold",
        [*OFFLOADED, "--ds-sequence-parallel-fpdt-host-memory", "0.00003"],
        ["--seq-length (64) take up", "--ds-sequence-parallel-fpdt-host-memory", "use --seq-length", "or less"],
    ),
    Case(
        "more kept than the host may hold",
        [*KEPT, "--ds-sequence-parallel-fpdt-host-memory", "0.00009"],
        ["leave out --ds-sequence-parallel-fpdt-recompute"],
    ),
    Case(
        "a missing folder for chunks",
        [*OFFLOADED, "--ds-sequence-parallel-fpdt-disk", "FOLDER,FOLDER/absent"],
        ["--ds-sequence-parallel-fpdt-disk (FOLDER/absent) does not exist", "create it"],
    ),
    Case("sequence beyond the positions", ["--max-position-embeddings", "32"], ["--seq-length (64)", "(32)"]),
    Case(
        "attention dropout with FPDT",
        [*FPDT, "--attention-dropout", "0.1"],
        ["--attention-dropout (0.1) must be 0 with --ds-sequence-parallel-fpdt"],
    ),
    Case(
        "chunk size without FPDT",
        ["--ds-sequence-parallel-fpdt-chunk-size", "32"],
        ["has no effect without --ds-sequence-parallel-fpdt", "add --ds-sequence-parallel-fpdt"],
    ),
    Case(
        "world that does not fit",
        ["--ds-sequence-parallel-size", "4"],
        ["--ds-sequence-parallel-size (4) must divide the number of ranks (1)", "start 4 ranks"],
    ),
    Case("fp16 without a GPU", ["--fp16"], ["--fp16 needs a GPU", "use --bf16"]),
    Case(
        "unknown DeepSpeed key",
        ["--deepspeed-config", "FOLDER/ds.json"],
        ['"zero_optimisation"', 'did you mean "zero_optimization"?'],
        _write_misspelt_json,
    ),
]


def run_into_error(flags: list[str], num_ranks: int = 1) -> list[Ended]:
    with Ranks(flags, num_ranks) as run:
        return run.wait()


def assert_one_clear_line(ended: Ended, words: list[str]) -> None:
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.exit_code == 2, ended
    assert len(lines) == 1, ended
    assert "Traceback" not in ended.stderr
    assert [word for word in words if word not in lines[0]] == [], lines[0]


def files_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_a_mistake_ends_in_one_clear_line_and_nothing_is_written(corpus: Path, tmp_path: Path, case: Case) -> None:
    own_corpus = copy_corpus(corpus, tmp_path / "numbers")
    case.prepare(corpus, tmp_path)
    before = files_below(tmp_path)
    outputs = ["--save", str(tmp_path / "saved"), "--tensorboard-dir", str(tmp_path / "events")]
    flags = [flag.replace("FOLDER", str(tmp_path)) for flag in case.flags]
    (ended,) = run_into_error([*base_flags(own_corpus), "--train-iters", "2", *outputs, *flags])
    assert_one_clear_line(ended, [word.replace("FOLDER", str(tmp_path)) for word in case.words])
    assert files_below(tmp_path) == before


SPREAD = ["--train-iters", "2", "--ds-sequence-parallel-size", "2"]


def test_dropout_of_rows_that_two_ranks_share_is_reported_by_the_first_one_alone(corpus: Path, tmp_path: Path) -> None:
    flags = [*SPREAD, "--num-attention-heads", "5", "--kv-channels", "8", "--attention-dropout", "0.1"]
    saved = ["--save", str(tmp_path / "saved")]
    first, second = run_into_error([*base_flags(corpus, GPT), *flags, *saved], num_ranks=2)
    assert_one_clear_line(first, ["--attention-dropout (0.1) must be 0", "use --attention-dropout 0, or"])
    assert second.exit_code == 2
    assert not any(line.startswith("error: ") for line in second.stderr.splitlines())
    assert files_below(tmp_path) == set()


def test_a_chunk_that_two_ranks_cannot_share_is_refused_before_they_meet(corpus: Path, tmp_path: Path) -> None:
    flags = [*SPREAD, *FPDT, "--ds-sequence-parallel-fpdt-chunk-size", "25", "--save", str(tmp_path / "saved")]
    with Ranks([*base_flags(corpus), *flags], num_ranks=1, world_size=2) as run:
        (ended,) = run.wait()
    assert_one_clear_line(ended, ["--ds-sequence-parallel-fpdt-chunk-size (25) must be a multiple of", "24 or 26"])
    assert files_below(tmp_path) == set()
