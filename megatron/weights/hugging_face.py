"""Conversion of Hugging Face models to portable weights and back, one parameter in memory at a time.

Everything is checked before anything is written: the architecture, and the name and shape of every tensor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.config import ModelConfig, architecture_fields, describe_difference
from megatron.weights.errors import WeightsError
from megatron.weights.families import FAMILIES, family_of
from megatron.weights.families.family import Family
from megatron.weights.families.values import count
from megatron.weights.parameters import TOKEN_ROWS, parameter_shapes
from megatron.weights.portable_config import CONFIG_FILE, PortableConfig, model_of, read_json
from megatron.weights.rearrangement import Rearrangement
from megatron.weights.safetensors_folder import DEFAULT_MAX_SHARD_BYTES, SafetensorsFolder, SafetensorsWriter
from megatron.weights.source import WeightSource

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
# A copy of the tied embedding, which some files hold all the same.
_TIED_HEADS = {"lm_head.weight", "embed_out.weight"}
# Keys of config.json that every family has.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TORCH_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
FORMATS = {name: dtype for dtype, name in _TORCH_NAMES.items()}

Report = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How converted weights are written."""

    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES
    dtype: torch.dtype | None = None
    """None: the dtype that they are stored in."""

    report: Report = field(default=lambda line: None)
    """Receives one line of progress per shard."""


@dataclass(frozen=True)
class _Parameter:
    """One of our parameters and the Hugging Face tensors that it is made of."""

    ours: str
    shape: tuple[int, ...]
    theirs: tuple[str, ...]
    arrangement: Rearrangement

    def their_shapes(self) -> list[tuple[int, ...]]:
        """Return the shape that each of their tensors must have."""
        return [tuple(t.shape) for t in self.arrangement.split(torch.empty(self.shape, device="meta"))]


class HuggingFaceWeights:
    """The model in a Hugging Face folder as a WeightSource under our names; each parameter is rearranged when read.

    The vocabulary is padded with the mean of its rows. The logit of such a row is the mean of the others. The
    log-sum-exp exceeds that mean by at least log(vocabulary). So the loss rises by at most
    log(1 + padding / vocabulary), whatever the weights are. Rows of zeros would have the logit 0, which could outweigh
    all others. The other logits do not change.

    Raises:
        WeightsError: the model is not supported, or a tensor is absent, unknown or of another shape.
    """

    def __init__(self, source: Path, make_vocab_size_divisible_by: int = 1) -> None:
        self.portable = read_hugging_face_config(source, make_vocab_size_divisible_by)
        family = family_of((self.portable.hugging_face or {}).get("model_type"))
        self._folder = SafetensorsFolder(source)
        _check_num_layers(self.portable.model, self._folder)
        parameters = _parameters(family, self.portable.model, self.portable.vocab_size, self._folder)
        _check(parameters, self._folder, family, self.portable.model)
        self._parameters = {parameter.ours: parameter for parameter in parameters}

    @property
    def names(self) -> Sequence[str]:
        return list(self._parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._parameters[name].shape
        return (self.portable.padded_vocab_size, *shape[1:]) if name in TOKEN_ROWS else shape

    def dtype(self, name: str) -> torch.dtype:
        return self._folder.dtype(self._parameters[name].theirs[0])

    def get(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        ours = parameter.arrangement.join([self._folder.get(theirs) for theirs in parameter.theirs])
        return _with_padding(ours, self.portable) if name in TOKEN_ROWS else ours


def from_hugging_face(
    source: Path, out: Path, settings: Settings, make_vocab_size_divisible_by: int = 1
) -> PortableConfig:
    """Write the Hugging Face model in folder `source` as portable weights into the new folder `out`.

    Raises:
        WeightsError: as HuggingFaceWeights, or `out` exists already.
    """
    weights = HuggingFaceWeights(source, make_vocab_size_divisible_by)
    with ReportingWriter(out, settings, with_manifest=True) as writer:
        for name in weights.names:
            writer.add(name, weights.get(name))
        weights.portable.write(writer.staging)
        copy_tokenizer(source, writer.staging)
    return weights.portable


def read_hugging_face_config(source: Path, make_vocab_size_divisible_by: int = 1) -> PortableConfig:
    """Read the config.json that portable weights made of a Hugging Face model would have.

    `source` is the model's folder or its config.json; only config.json is read.
    WeightsError if the model is not supported.
    """
    config = read_json(source if source.is_file() else source / CONFIG_FILE)
    model = model_of(family_of(config.get("model_type")).model_fields(config))
    vocab_size = count(config, "vocab_size")
    padded_vocab_size = -(-vocab_size // make_vocab_size_divisible_by) * make_vocab_size_divisible_by
    return PortableConfig(model, vocab_size, padded_vocab_size, config)


def from_our_names(source: WeightSource, portable: PortableConfig, out: Path, settings: Settings) -> None:
    """Write weights that already have our names as portable weights into the new folder `out`.

    WeightsError if a tensor is absent, unknown or of another shape, or `out` exists already.
    """
    shapes = check_ours(source, portable)
    with ReportingWriter(out, settings, with_manifest=True) as writer:
        for name in shapes:
            writer.add(name, source.get(name))
        portable.write(writer.staging)


def to_hugging_face(
    source: WeightSource,
    portable: PortableConfig,
    out: Path,
    settings: Settings,
    beside: Iterable[Path] = (),
    model_type: str | None = None,
) -> Family:
    """Write the weights of `source`, which have our names, as a Hugging Face model into the new folder `out`.

    `beside` are folders whose tokenizer files are copied; of files of one name, the first is taken. Without a
    model_type the family is the one that the weights came from, or the first that can express the architecture.

    Raises:
        WeightsError: no family can express the architecture, a tensor is absent or of another shape, or `out` exists.
    """
    if portable.vocab_size > portable.padded_vocab_size:
        raise WeightsError(
            f"the vocabulary ({portable.vocab_size}) must be at most the {portable.padded_vocab_size} rows of the "
            "embedding; give --vocab-size, or the --like that the training began with."
        )
    family = choose_family(portable, model_type)
    check_ours(source, portable)
    with ReportingWriter(out, settings, with_manifest=False) as writer:
        for parameter in _parameters(family, portable.model, portable.padded_vocab_size):
            ours = source.get(parameter.ours)
            if parameter.ours in TOKEN_ROWS:
                ours = ours[: portable.vocab_size]
            for name, tensor in zip(parameter.theirs, parameter.arrangement.split(ours), strict=True):
                writer.add(name, tensor)
        dtype = settings.dtype or source.dtype(TOKEN_ROWS[0])
        content = _config_json(family, portable, dtype)
        (writer.staging / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")
        for folder in beside:
            copy_tokenizer(folder, writer.staging)
    return family


def choose_family(portable: PortableConfig, model_type: str | None = None) -> Family:
    """Return the family named, else the one the weights came from, else the first that can express the architecture."""
    came_from = (portable.hugging_face or {}).get("model_type")
    wanted = [model_type or came_from] if model_type or came_from else list(FAMILIES)
    faults = {}
    for family in map(family_of, wanted):
        difference = _not_expressed(family, portable.model)
        if not difference:
            return family
        faults[family.model_type] = difference
    described = " | ".join(f"{name}: {difference}" for name, difference in faults.items())
    raise WeightsError(f"no supported Hugging Face model_type can hold this architecture ({described}).")


def _not_expressed(family: Family, model: ModelConfig) -> str:
    """Name the first setting that a model of the family would change; empty if there is none."""
    try:
        read_back = model_of(family.model_fields({**family.to_config(model), **family.fixed}))
    except WeightsError as error:
        return str(error)
    return (
        describe_difference(architecture_fields(read_back), architecture_fields(model))
        .replace(" in the checkpoint", " there")
        .replace(" in the flags", " here")
    )


def num_rows(source: WeightSource) -> int:
    """Return the number of rows of the embedding."""
    if TOKEN_ROWS[0] not in source.names:
        raise WeightsError(f"the weights have no tensor {TOKEN_ROWS[0]!r}; name portable weights.")
    return source.shape(TOKEN_ROWS[0])[0]


def training_flags(portable: PortableConfig) -> list[str]:
    """Return the flags of pretrain_gpt.py that describe the model, with as many embedding rows as the weights have."""
    model, default = portable.model, ModelConfig(num_layers=0, hidden_size=0, num_attention_heads=0, seq_length=0)
    values = {**architecture_fields(model), "max_position_embeddings": model.max_position_embeddings}
    flags = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags += [flag] * value
        elif value != getattr(default, name):
            flags += [flag, str(value)]
    return [*flags, "--make-vocab-size-divisible-by", str(portable.padded_vocab_size)]


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy those of the tokenizer's files that exist and are not yet in `out`."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and not (out / name).exists():
            shutil.copyfile(source / name, out / name)


class ReportingWriter:
    """A writer that casts if asked, and reports each shard as it begins."""

    def __init__(self, out: Path, settings: Settings, with_manifest: bool) -> None:
        self._settings = settings
        self._writer = SafetensorsWriter(out, settings.max_shard_bytes, with_manifest)
        self.staging = self._writer.staging
        self._num_reported = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._settings.dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self._settings.dtype)
        self._writer.add(name, tensor)
        if self._writer.num_shards > self._num_reported:
            self._num_reported = self._writer.num_shards
            self._settings.report(f"shard {self._num_reported} of {self._writer.folder}, from {name} on")

    def __enter__(self) -> ReportingWriter:
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        self._writer.__exit__(error_type, error)


def _parameters(
    family: Family, model: ModelConfig, num_rows: int, folder: WeightSource | None = None
) -> list[_Parameter]:
    """List our parameters in the model's order, each with its Hugging Face names."""
    prefix = _prefix(family, folder)
    parameters = []
    for ours, shape in parameter_shapes(model, num_rows).items():
        theirs, arrange = family.names(ours)
        parameters.append(_Parameter(ours, shape, tuple(prefix + name for name in theirs), arrange(model)))
    return parameters


def _prefix(family: Family, folder: WeightSource | None) -> str:
    """Return the prefix of the names in a folder; without a folder, the prefix to write."""
    names, _ = family.names(TOKEN_ROWS[0])
    found = [] if folder is None else [prefix for prefix in family.prefixes if prefix + names[0] in set(folder.names)]
    return (found or list(family.prefixes))[0]


def _check(parameters: Sequence[_Parameter], folder: SafetensorsFolder, family: Family, model: ModelConfig) -> None:
    """Raise WeightsError unless every tensor is present in the expected shape, and none is left over."""
    used: set[str] = set()
    for parameter in parameters:
        for name, shape in zip(parameter.theirs, parameter.their_shapes(), strict=True):
            _check_shape(folder, name, shape)
            if not folder.dtype(name).is_floating_point:
                raise WeightsError(
                    f"the tensor {name!r} holds {str(folder.dtype(name)).removeprefix('torch.')}, and floating-point "
                    "weights are supported; use a model that is not quantized."
                )
        used.update(parameter.theirs)
    if not model.untie_embeddings_and_output_weights:
        used |= _TIED_HEADS
        (embedding,) = next(parameter.theirs for parameter in parameters if parameter.ours == TOKEN_ROWS[0])
        _check_tied(folder, embedding)
    _refuse_unknown(name for name in folder.names if name not in used and not family.is_buffer(name))


def _check_tied(folder: SafetensorsFolder, embedding: str) -> None:
    """Raise WeightsError if a file that ties the head to the embedding holds a different head as well.

    transformers uses such a head since version 5; earlier versions drop it.
    """
    for head in sorted(_TIED_HEADS & set(folder.names)):
        if not folder.same(head, embedding):
            raise WeightsError(
                f"config.json has tie_word_embeddings true, and {head!r} differs from {embedding!r}; set "
                f"tie_word_embeddings to false if the model has a head of its own, or remove {head!r}."
            )


def _check_num_layers(model: ModelConfig, folder: WeightSource) -> None:
    """Raise WeightsError if there are more layers than tensors, before a model is described: each layer has some."""
    if model.num_layers > len(folder.names):
        raise WeightsError(
            f"config.json has {model.num_layers} layers, and the weights have {len(folder.names)} tensors; use the "
            "config.json of these weights."
        )


def check_ours(source: WeightSource, portable: PortableConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of our parameters; WeightsError unless `source` has them all, and nothing else."""
    shapes = parameter_shapes(portable.model, portable.padded_vocab_size)
    for name, shape in shapes.items():
        _check_shape(source, name, shape)
    _refuse_unknown(set(source.names) - set(shapes) - {TOKEN_ROWS[1]})
    return shapes


def _check_shape(source: WeightSource, name: str, shape: tuple[int, ...]) -> None:
    if name not in source.names:
        raise WeightsError(f"the weights have no tensor {name!r}, which config.json asks for; use whole weights.")
    if source.shape(name) != shape:
        raise WeightsError(
            f"the tensor {name!r} is {list(source.shape(name))}, and config.json asks for {list(shape)}; use the "
            "config.json of these weights."
        )


def _refuse_unknown(names: Iterable[str]) -> None:
    unknown = sorted(names)
    if unknown:
        raise WeightsError(
            f"the weights have {len(unknown)} tensors that nothing here takes, {unknown[0]!r} first; only models "
            "without further parts are supported."
        )


def _with_padding(rows: Tensor, portable: PortableConfig) -> Tensor:
    missing = portable.padded_vocab_size - rows.shape[0]
    if not missing:
        return rows
    mean = torch.zeros(rows.shape[1], dtype=torch.float64)
    for part in rows.split(4096):
        mean += part.sum(0, dtype=torch.float64)
    return torch.cat([rows, (mean / rows.shape[0]).to(rows.dtype).expand(missing, -1)])


def _config_json(family: Family, portable: PortableConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Build the family's config.json; keys that do not affect the arithmetic are carried over from the original."""
    # A model that did not come from Hugging Face has no token ids; if they are absent, transformers uses the family's.
    before: Mapping[str, Any] = portable.hugging_face or dict.fromkeys(TOKEN_IDS)
    carried_over = set(before) - family.managed - {"dtype", "torch_dtype", "transformers_version"}
    if before.get("model_type") != family.model_type:
        carried_over &= set(TOKEN_IDS)
    return {
        **{key: value for key, value in before.items() if key in carried_over},
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": portable.vocab_size,
        **family.to_config(portable.model),
        **family.fixed,
        "torch_dtype": _TORCH_NAMES.get(dtype, "float32"),
    }
