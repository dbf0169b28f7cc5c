"""Names of files and folders, and empty words."""

import pytest

from tests.unit.config.commands import complaint


@pytest.mark.parametrize(
    ("flag", "longest"), [("--save", 255), ("--load", 255), ("--tensorboard-dir", 255), ("--data-path", 251)]
)
def test_a_name_that_no_file_system_takes_is_refused(flag: str, longest: int) -> None:
    told = complaint(f"{flag} folder/{'é' * 150}/file")
    assert told.startswith(f"{flag} has a name of 300 bytes, {'é' * 20}..., ")
    assert told.endswith(f"may have {longest} here; use a shorter one")
    assert complaint(f"{flag} folder/{'a' * longest}/file") == ""
    assert f"{flag} is a path of 4097 bytes" in complaint(f"{flag} {'a/' * 2048}a")


@pytest.mark.parametrize("flag", ["--save", "--load", "--wandb-project", "--data-path", "--vocab-file"])
def test_an_empty_word_is_not_taken_for_a_flag_that_is_not_given(flag: str) -> None:
    assert complaint(f"{flag}=") == f"{flag} has an empty value; give one, or remove {flag}"
