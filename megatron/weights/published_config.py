"""The config.json of a Hugging Face model, as it was published; readable without transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.weights.errors import WeightsError
from megatron.weights.portable_config import CONFIG_FILE, read_json

# Its name inside a checkpoint of that model, where config.json is the configuration of the run.
PUBLISHED_FILE = "hugging_face.json"
# Says in a checkpoint of adapters which weights they were trained on.
BASE_FILE = "adapter_base.json"
# The key that describes quantized weights.
QUANTIZATION = "quantization_config"
_WEIGHT_FILES = ("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds files of weights, in any format: a config.json alone is of an untrained model."""
    return any(any(folder.glob(pattern)) for pattern in _WEIGHT_FILES)


def read_published_config(folder: Path) -> dict[str, Any]:
    """Read a Hugging Face folder's config.json; WeightsError if it is none."""
    content = read_json(folder / CONFIG_FILE)
    if "model_type" not in content:
        raise WeightsError(f"{folder / CONFIG_FILE} has no model_type; name the folder of a Hugging Face model.")
    return content
