"""Packages that only some flags and commands need, and that may be absent."""

import importlib.util

from megatron.config.errors import ConfigError

EXTRAS = {
    "bitsandbytes": "qlora",
    "lm_eval": "lm-eval",
    "matplotlib": "plots",
    "peft": "hf",
    "tensorboard": "tensorboard",
    "transformers": "hf",
    "wandb": "wandb",
}


def require_package(package: str, purpose: str) -> None:
    """Raise ConfigError unless the package is installed. `purpose`: the flag or command that needs it."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{purpose} needs the package {package}, which is not installed; run `pip install '.[{EXTRAS[package]}]'` "
            "in the folder of this code."
        )
