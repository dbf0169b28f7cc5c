"""The cross-checks of the configuration, as one table that is walked from the top.

A rule may take for granted what the rules above it have checked: single values first, then what they mean together.
"""

from megatron.config.config import Config
from megatron.config.errors import ConfigError
from megatron.config.rules.common import Rule, Run
from megatron.config.rules.deepspeed import DEEPSPEED_RULES
from megatron.config.rules.effects import EFFECT_RULES
from megatron.config.rules.model import MODEL_RULES
from megatron.config.rules.names import NAME_RULES
from megatron.config.rules.parallel import PARALLEL_RULES
from megatron.config.rules.ranges import RANGE_RULES
from megatron.config.rules.training import TRAINING_RULES

RULES: tuple[Rule, ...] = (
    *RANGE_RULES,
    *NAME_RULES,
    *EFFECT_RULES,
    *MODEL_RULES,
    *PARALLEL_RULES,
    *TRAINING_RULES,
    *DEEPSPEED_RULES,
)


def validate(config: Config, world_size: int, device_type: str) -> None:
    """Check that the settings are possible together, for `world_size` ranks of "cuda" or "cpu" devices.

    Needs no process group and reads no files: a plain function of its arguments, the same on every rank.

    Raises:
        ConfigError: the first rule that is broken, in one line.
    """
    run = Run(config, world_size, device_type)
    for rule in RULES:
        message = rule(run)
        if message is not None:
            raise ConfigError(message)
