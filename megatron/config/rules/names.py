"""Rules for names of files and folders: a file system accepts them, and no value is empty."""

from __future__ import annotations

import os
from dataclasses import fields

from megatron.config.config import config_sections
from megatron.config.rules.common import Rule, Run, flag, value_of

# Linux limits, in bytes, of one name and of a whole path. A dataset's prefix leaves room for .bin and .idx.
NAME_BYTES, PATH_BYTES, SUFFIX_BYTES = 255, 4095, 4
PREFIXES = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
FILES_AND_FOLDERS = (
    *("hf_model", "load_adapter", "save", "save_hf", "load", "deepspeed_config", "data_cache_path", "chat_template"),
    *("vocab_file", "merge_file", "tokenizer_model"),
    *("tensorboard_dir", "profile_dir", "wandb_save_dir"),
)


def no_word_is_empty(run: Run) -> str | None:
    """Check that no word is empty: an empty one would look like a flag that is not given."""
    for section in config_sections().values():
        for member in fields(section):
            if "" in _words(run, member.name):
                return f"{flag(member.name)} has an empty value; give one, or remove {flag(member.name)}"
    return None


def names_fit_a_file_system(run: Run) -> str | None:
    for name in (*PREFIXES, *FILES_AND_FOLDERS):
        room = NAME_BYTES - (SUFFIX_BYTES if name in PREFIXES else 0)
        for path in _words(run, name):
            longest = max(path.split("/"), key=_num_bytes)
            if _num_bytes(longest) > room:
                return (
                    f"{flag(name)} has a name of {_num_bytes(longest)} bytes, {longest[:20]}..., and a name of a file "
                    f"or folder may have {room} here; use a shorter one"
                )
            if _num_bytes(path) > PATH_BYTES:
                return (
                    f"{flag(name)} is a path of {_num_bytes(path)} bytes, {path[:20]}..., and a path may have "
                    f"{PATH_BYTES}; use a shorter one"
                )
    return None


def _words(run: Run, name: str) -> tuple[str, ...]:
    value = value_of(run.config, name)
    words = value if isinstance(value, tuple) else (value,)
    return tuple(word for word in words if isinstance(word, str))


def _num_bytes(name: str) -> int:
    return len(os.fsencode(name))


NAME_RULES: tuple[Rule, ...] = (no_word_is_empty, names_fit_a_file_system)
