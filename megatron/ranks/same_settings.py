"""Check that all ranks run with the same settings, data, tokenizer and code: otherwise they diverge silently.

Every rank writes its settings to the store, as short texts by name. Rank 0 compares them and writes the difference, if
there is one. Nothing is allocated and no process group is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch.distributed as dist

import megatron
from megatron.config import Config, ConfigError, config_sections

POLL_SECONDS = 0.1
SHOWN_CHARACTERS = 200

# Flags that may differ: paths on a rank's own machine, and flags that only affect the output of one rank.
OWN = frozenset(
    {"local_rank", "data_cache_path", "tensorboard_dir", "profile_dir", "wandb_save_dir", "progress"}
    | {"heartbeat_seconds", "log_format", "deepspeed_config"}
)
# Flags that name files; the names may differ where the content is the same.
DATA = frozenset({"data_path", "train_data_path", "valid_data_path", "test_data_path"})
FILES = frozenset({"hf_model", "load_adapter", "vocab_file", "merge_file", "tokenizer_model", "chat_template"})
FOLDER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("adapter_config.json", "adapter_model.safetensors"),
)

PACKAGES = (
    *("torch", "deepspeed", "numpy", "triton", "tokenizers", "sentencepiece", "transformers"),
    *("flash-attn", "flash-attn-4"),
)
# Libraries read these themselves; they change results.
VARIABLES = (
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"),
    *("NCCL_ALGO", "NCCL_NVLS_ENABLE"),
)

# A file larger than WHOLE_BYTES is compared by its size and by blocks spread evenly over it: 16 MiB of a terabyte.
WHOLE_BYTES = 2**26
NUM_BLOCKS, BLOCK_BYTES = 1024, 2**14


def require_same_settings(
    settings: Mapping[str, str], rank: int, world_size: int, store: dist.Store, poll_seconds: float = POLL_SECONDS
) -> None:
    """Raise ConfigError on every rank, with a setting that differs and its values, unless all are the same.

    Collective over all ranks, once; the watchdog enforces the time limit.
    """
    own = json.dumps(settings)
    store.set(f"settings/{rank}", own)
    if rank == 0:
        others = (_wait_for(store, f"settings/{other}", poll_seconds) for other in range(1, world_size))
        store.set("settings/fault", _fault([own, *others]))
    fault = _wait_for(store, "settings/fault", poll_seconds)
    # Rank 0 owns the store, so it must not end before the others have read it.
    store.add("settings/heard", 1)
    if fault:
        deadline = time.monotonic() + 10
        while rank == 0 and store.add("settings/heard", 0) < world_size and time.monotonic() < deadline:
            time.sleep(poll_seconds)
        raise ConfigError(fault)


def _wait_for(store: dist.Store, key: str, poll_seconds: float) -> str:
    while not store.check([key]):
        time.sleep(poll_seconds)
    return store.get(key).decode()


def _fault(texts: Sequence[str]) -> str:
    """Describe how the settings of some ranks differ from those of rank 0; "" where all are the same."""
    first = json.loads(texts[0])
    for text in texts:
        if text == texts[0]:
            continue
        other = json.loads(text)
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        ranks = [rank for rank, each in enumerate(texts) if each == text]
        more = f" (and {len(names) - 1} more differ: {', '.join(names[1:4])})" if len(names) > 1 else ""
        return (
            f"{names[0]} is {_shown(first.get(names[0]))} on rank 0 and {_shown(other.get(names[0]))} on {_all(ranks)}"
            f"{more}; start all ranks with the same flags, data, tokenizer and code"
        )
    return ""


def _shown(value: str | None) -> str:
    text = "not there" if value is None else value
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _all(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:8]))}{' and others' if len(ranks) > 8 else ''}"


def settings_of(config: Config, world_size: int, device: str) -> dict[str, str]:
    """Collect the settings of a rank: name to text. Reads the data and the tokenizer's files."""
    settings = {"WORLD_SIZE": str(world_size), "the device": device, **dict(_flags(config))}
    settings.update({f"the environment's {name}": os.environ.get(name, "not set") for name in VARIABLES})
    settings.update({"the version of Python": sys.version.split()[0]})
    settings.update({f"the version of {package}": _version(package) for package in PACKAGES})
    folder = Path(megatron.__file__).parent
    sources = {f"megatron/{path.relative_to(folder)}": path for path in sorted(folder.rglob("*.py"))}
    script = Path(sys.argv[0])
    if script.is_file():
        sources[script.name] = script
    settings.update({f"the code of {name}": content(path) for name, path in sources.items()})
    return settings


def _flags(config: Config) -> Iterator[tuple[str, str]]:
    for name in config_sections():
        section = getattr(config, name)
        for member in fields(section):
            flag, value = f"--{member.name.replace('_', '-')}", getattr(section, member.name)
            if member.name in DATA:
                yield from _dataset_contents(flag, value)
            elif member.name in FILES:
                yield f"the content of {flag}", "none" if value is None else content(Path(value))
            elif member.name not in OWN:
                yield flag, _text(value)
    for key, value in sorted(config.deepspeed_json.items()):
        yield f"{key} of --deepspeed-config", json.dumps(value, sort_keys=True)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "not set" if value is None else str(value)


def _dataset_contents(flag: str, words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the blending weights unchanged, and the content of the files of each dataset."""
    names = [word for word in words if not _is_number(word)]
    yield flag, " ".join(word if _is_number(word) else "DATA" for word in words) or "none"
    for number, name in enumerate(names, start=1):
        which = f"dataset {number} of {flag}" if len(names) > 1 else flag
        parts = [path for path in (Path(f"{name}.idx"), Path(f"{name}.bin")) if path.is_file()]
        for path in parts or [Path(name)]:
            yield f"the content of {which}" + (f", its {path.suffix}," if parts else ""), content(path)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def content(path: Path) -> str:
    """Return size and hash of a file, hashed whole or by samples; of a folder, those of a tokenizer, an adapter or
    Hugging Face datasets."""
    if path.is_dir():
        found = [*path.glob("*.arrow"), *path.glob("*/*.arrow")]
        tables = sorted(file.relative_to(path).as_posix() for file in found)
        present = [name for name in (*FOLDER_FILES, *tables) if (path / name).is_file()]
        return ", ".join(f"{name}: {content(path / name)}" for name in present)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.sha256()
            for start, num_bytes in _blocks(size):
                file.seek(start)
                digest.update(file.read(num_bytes))
    except OSError as error:
        return f"unreadable ({error.strerror})"
    return f"{size} bytes with hash {digest.hexdigest()[:12]}"


def _blocks(size: int) -> list[tuple[int, int]]:
    """Return (start, bytes) of the blocks to read of a file; they always include the first and the last byte."""
    if size <= WHOLE_BYTES:
        return [(0, size)]
    return [(number * (size - BLOCK_BYTES) // (NUM_BLOCKS - 1), BLOCK_BYTES) for number in range(NUM_BLOCKS)]
