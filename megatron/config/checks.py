"""Validation of the configuration: one table of rules, checked from top to bottom.

A rule may rely on the rules above it: those of single values come first, then those between values.
"""

from collections.abc import Sequence
from functools import partial

from megatron.config.architecture import architecture_fields
from megatron.config.config import Config
from megatron.config.errors import ConfigError
from megatron.config.model import ModelConfig
from megatron.config.optimizer import OptimizerConfig
from megatron.config.rules.common import Rule, Run
from megatron.config.rules.deepspeed import DEEPSPEED_RULES
from megatron.config.rules.effects import EFFECT_RULES
from megatron.config.rules.lengths import LENGTH_RULES
from megatron.config.rules.model import ARCHITECTURE_RULES, MODEL_RULES
from megatron.config.rules.names import NAME_RULES
from megatron.config.rules.parallel import PARALLEL_RULES
from megatron.config.rules.ranges import RANGE_RULES, RANGES, in_range
from megatron.config.rules.training import TRAINING_RULES

RULES: tuple[Rule, ...] = (
    *RANGE_RULES,
    *NAME_RULES,
    *EFFECT_RULES,
    *MODEL_RULES,
    *PARALLEL_RULES,
    *LENGTH_RULES,
    *TRAINING_RULES,
    *DEEPSPEED_RULES,
)


def validate(config: Config, world_size: int, device_type: str) -> None:
    """Check that the settings are compatible, for `world_size` ranks of "cuda" or "cpu" devices.

    Needs no process group and reads no files: a pure function of its arguments, with the same result on every rank.

    Raises:
        ConfigError: the first rule that fails, in one line.
    """
    _check(RULES, Run(config, world_size, device_type))


def check_architecture(model: ModelConfig) -> None:
    """Check that flags can describe a model, independent of the run that it is for.

    Raises:
        ConfigError: the first rule that fails, in one line.
    """
    names = [name for name in ("max_position_embeddings", *architecture_fields(model)) if name in RANGES]
    ranges = [partial(in_range, name, RANGES[name]) for name in names]
    _check((*ranges, *ARCHITECTURE_RULES), Run(Config(model=model, optimizer=OptimizerConfig(lr=1.0)), 1, "cpu"))


def _check(rules: Sequence[Rule], run: Run) -> None:
    for rule in rules:
        message = rule(run)
        if message is not None:
            raise ConfigError(message)
