"""The configuration: one frozen dataclass per concern, one attribute per flag."""

from megatron.config.adapters import AdaptersConfig
from megatron.config.architecture import architecture_fields, describe_difference, describe_mismatch, with_rope_of
from megatron.config.batch import accumulation_steps, data_parallel_size, default_batch_notes, global_batch_size
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.checks import check_architecture, validate
from megatron.config.config import Config, config_sections
from megatron.config.data import DataConfig
from megatron.config.deepspeed import DeepSpeedConfig
from megatron.config.deepspeed_json import deepspeed_config, offloads, zero_stage_run
from megatron.config.errors import ConfigError
from megatron.config.finetuning import FinetuningConfig
from megatron.config.hugging_face import HuggingFaceModelConfig
from megatron.config.logging import ALONE, LoggingConfig
from megatron.config.model import ModelConfig, TokenCount
from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import AUTOMATIC_CHUNK, ChunkSize, Folders, GibOrAuto, ParallelConfig, default_chunk
from megatron.config.precision import PrecisionConfig
from megatron.config.recompute import Recompute
from megatron.config.sample_lengths import SampleLengths, sample_lengths
from megatron.config.sizes import AdapterSizes, ModelSizes, TokenWeights
from megatron.config.tokenizer import TokenizerConfig
from megatron.config.training import TrainingConfig

__all__ = [
    "ALONE",
    "AUTOMATIC_CHUNK",
    "AdapterSizes",
    "AdaptersConfig",
    "CheckpointConfig",
    "ChunkSize",
    "Config",
    "ConfigError",
    "DataConfig",
    "DeepSpeedConfig",
    "FinetuningConfig",
    "Folders",
    "GibOrAuto",
    "HuggingFaceModelConfig",
    "LoggingConfig",
    "ModelConfig",
    "ModelSizes",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "Recompute",
    "SampleLengths",
    "TokenCount",
    "TokenWeights",
    "TokenizerConfig",
    "TrainingConfig",
    "accumulation_steps",
    "architecture_fields",
    "check_architecture",
    "config_sections",
    "data_parallel_size",
    "deepspeed_config",
    "default_batch_notes",
    "default_chunk",
    "describe_difference",
    "describe_mismatch",
    "global_batch_size",
    "offloads",
    "sample_lengths",
    "validate",
    "with_rope_of",
    "zero_stage_run",
]
