"""What ranks must have in common, what they need not, and how a difference is put into words."""

import threading
from pathlib import Path

import pytest
import torch.distributed as dist

import megatron.ranks.same_settings
from megatron.arguments import parse_args
from megatron.config import ConfigError
from megatron.ranks.same_settings import content, require_same_settings, settings_of

MODEL = [
    "--num-layers",
    "2",
    "--hidden-size",
    "64",
    "--num-attention-heads",
    "8",
    "--seq-length",
    "128",
    "--lr",
    "1e-4",
]


def settings(*flags: str) -> dict[str, str]:
    return settings_of(parse_args([*MODEL, *flags]), 2, "cpu")


def differing(*flags: str, without: tuple[str, ...] = ()) -> list[str]:
    one, other = settings(*without), settings(*flags)
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def write_dataset(prefix: Path, tokens: bytes) -> str:
    prefix.parent.mkdir(exist_ok=True)
    Path(f"{prefix}.bin").write_bytes(tokens)
    Path(f"{prefix}.idx").write_bytes(b"index")
    return str(prefix)


@pytest.mark.parametrize(
    "flags, name",
    [
        (["--lr", "2e-4"], "--lr"),
        (["--seed", "7"], "--seed"),
        (["--clip-grad", "2"], "--clip-grad"),
        (["--save", "elsewhere"], "--save"),
        (["--profile-ranks", "0", "1"], "--profile-ranks"),
    ],
)
def test_a_flag_that_differs_is_found(flags: list[str], name: str) -> None:
    assert differing(*flags) == [name]


@pytest.mark.parametrize(
    "flags",
    [
        ["--tensorboard-dir", "here"],
        ["--data-cache-path", "here"],
        ["--progress", "off"],
        ["--heartbeat-seconds", "7"],
        ["--local-rank", "3"],
        ["--clip-grad", "1.0"],  # the default, said aloud
    ],
)
def test_what_belongs_to_one_machine_may_differ(flags: list[str]) -> None:
    assert differing(*flags) == []


def test_keys_of_the_deepspeed_json_count_and_its_name_does_not(tmp_path: Path) -> None:
    texts = {"a": '{"zero_optimization": {"stage": 1}}', "b": '{ "zero_optimization": { "stage": 1}}'}
    texts["c"] = '{"zero_optimization": {"stage": 1, "overlap_comm": true}}'
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    flags = {name: ("--deepspeed-config", str(tmp_path / name)) for name in texts}
    assert differing(*flags["b"], without=flags["a"]) == []
    assert differing(*flags["c"], without=flags["a"]) == ["zero_optimization of --deepspeed-config"]


def test_data_count_by_content_and_not_by_name(tmp_path: Path) -> None:
    here, there = (write_dataset(tmp_path / name / "data", b"tokens") for name in ("here", "there"))
    other = write_dataset(tmp_path / "other", b"t0kens")
    assert differing("--data-path", there, without=("--data-path", here)) == []
    assert differing("--data-path", other, without=("--data-path", here)) == ["the content of --data-path, its .bin,"]
    blend = ("--data-path", "0.3", here, "0.7", there)
    assert differing("--data-path", "0.3", here, "0.7", other, without=blend) == [
        "the content of dataset 2 of --data-path, its .bin,"
    ]
    assert differing("--data-path", "0.4", here, "0.6", there, without=blend) == ["--data-path"]


@pytest.mark.parametrize(
    "flag, name", [("--tokenizer-model", "tokenizer.json"), ("--data-path", "data-00000-of-00001.arrow")]
)
def test_files_of_folders_count_by_content(tmp_path: Path, flag: str, name: str) -> None:
    for folder, text in (("a", "{}"), ("b", "{}"), ("c", "[]")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    flags = {folder: (flag, str(tmp_path / folder)) for folder in "abc"}
    assert differing(*flags["b"], without=flags["a"]) == []
    assert differing(*flags["c"], without=flags["a"]) == [f"the content of {flag}"]


def test_code_versions_and_variables_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings()
    assert {"the code of megatron/training/loop.py", "the version of torch", "WORLD_SIZE"} <= set(before)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert settings()["the environment's NVIDIA_TF32_OVERRIDE"] == "1"
    assert before["the environment's NVIDIA_TF32_OVERRIDE"] == "not set"


def test_a_large_file_is_read_in_samples_that_hold_both_its_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron.ranks.same_settings, "WHOLE_BYTES", 10_000)
    monkeypatch.setattr(megatron.ranks.same_settings, "NUM_BLOCKS", 5)
    monkeypatch.setattr(megatron.ranks.same_settings, "BLOCK_BYTES", 100)
    file = tmp_path / "file"

    def with_change_at(position: int) -> str:
        data = bytearray(50_000)
        data[position] = 1
        file.write_bytes(data)
        return content(file)

    seen = {with_change_at(position) for position in (0, 25_000, 49_999)}
    assert len(seen) == 3
    unseen = with_change_at(1000)
    assert unseen == with_change_at(2000) not in seen
    assert content(tmp_path / "none") == "unreadable (No such file or directory)"


def compare(*each: dict[str, str]) -> list[str]:
    """Run one thread per rank; return the errors of all ranks."""
    store, errors = dist.HashStore(), ["the same"] * len(each)

    def rank(number: int) -> None:
        try:
            require_same_settings(each[number], number, len(each), store, poll_seconds=0.001)
        except ConfigError as error:
            errors[number] = str(error)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(each))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return errors


def test_all_ranks_report_a_difference() -> None:
    same = {"--lr": "0.1", "--seed": "1"}
    assert compare(same, same, same) == ["the same"] * 3
    other = {**same, "--lr": "0.2"}
    advice = "start all ranks with the same flags, data, tokenizer and code"
    assert compare(same, other, same, other) == [f"--lr is 0.1 on rank 0 and 0.2 on ranks 1, 3; {advice}"] * 4
    (told, _) = compare(same, {"--lr": "0.2", "--more": "yes"})
    assert told.startswith("--lr is 0.1 on rank 0 and 0.2 on rank 1 (and 2 more differ: --seed, --more); ")
    (told, _) = compare({"--a": "1"}, {"--b": "1"})
    assert told.startswith("--a is 1 on rank 0 and not there on rank 1")
