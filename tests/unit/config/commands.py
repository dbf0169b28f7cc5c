"""Command lines for the tests of the configuration."""

from megatron.arguments import parse_args
from megatron.config import Config, ConfigError, validate

GPT = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "8", "--seq-length", "1024", "--lr", "1e-4"]
DATA = ["--data-path", "some_text_document", "--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]
RUNNABLE = [*GPT, *DATA, "--train-iters", "10"]


def parsed(flags: str = "") -> Config:
    """The configuration of a small GPT with further flags, which win over its own."""
    return parse_args([*RUNNABLE, *flags.split()])


def complaint(flags: str = "", world_size: int = 1, device_type: str = "cuda") -> str:
    """What is wrong with the flags, or "" if nothing is."""
    try:
        validate(parsed(flags), world_size, device_type)
    except ConfigError as error:
        return str(error)
    return ""
