"""The planner's job: the model to train, its parallelism, and its offloading and recomputation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from megatron.config import (
    Config,
    ModelConfig,
    Recompute,
    accumulation_steps,
    default_chunk,
    offloads,
    zero_stage_run,
)
from megatron.fpdt.memory_model import StreamShape
from megatron.planner.hardware import GIB

# Without FPDT: the activations of a block's forward pass that are saved for backward.
Activations = Literal["kept", "recomputed", "recomputed from the host"]

HALF = 2  # bytes of a bf16 or fp16 number
SUM = 4  # bytes of an fp32 number
NF4 = 36 / 64  # bytes of a number in NF4, with the scale of its block


@dataclass(frozen=True)
class Job:
    """A run in half precision, with FPDT and offloading or without FPDT; the model's seq_length is the job's length.

    `recompute` and `checkpoint_interval` None: chosen to fit host memory, as a training run does. `activations` applies
    without FPDT, where the one chunk is the whole sequence.
    """

    model: ModelConfig
    padded_vocab_size: int
    num_gpus: int
    chunk_length: int
    sequence_parallel_size: int
    micro_batch_size: int = 1
    accumulation_steps: int = 1
    zero_stage: int = 3
    cpu_optimizer: bool = False
    streamed: bool = True
    activations: Activations = "kept"
    device_memory_bytes: int = 0  # chunks that may stay on a GPU
    recompute: Recompute | None = None
    checkpoint_interval: int | None = None

    @classmethod
    def of(cls, config: Config, num_gpus: int, padded_vocab_size: int) -> Job:
        """Return the job that flags of a training run describe; for auto the default chunk, and none on the GPU."""
        parallel, deepspeed = config.parallel, config.deepspeed
        streamed = parallel.ds_sequence_parallel_fpdt
        chunk = parallel.ds_sequence_parallel_fpdt_chunk_size or default_chunk(parallel.ds_sequence_parallel_size)
        recomputed: Activations = "recomputed from the host" if deepspeed.checkpoint_in_cpu else "recomputed"
        return cls(
            model=config.model,
            padded_vocab_size=padded_vocab_size,
            num_gpus=num_gpus,
            chunk_length=chunk if streamed else config.model.seq_length,
            sequence_parallel_size=parallel.ds_sequence_parallel_size,
            micro_batch_size=config.training.micro_batch_size,
            accumulation_steps=accumulation_steps(config, num_gpus),
            zero_stage=zero_stage_run(config),
            cpu_optimizer=offloads(config, "offload_optimizer"),
            streamed=streamed,
            activations=recomputed if deepspeed.deepspeed_activation_checkpointing else "kept",
            device_memory_bytes=int((parallel.ds_sequence_parallel_fpdt_device_memory or 0) * GIB),
            recompute=parallel.ds_sequence_parallel_fpdt_recompute,
            checkpoint_interval=parallel.ds_sequence_parallel_fpdt_checkpoint_interval,
        )

    @cached_property
    def shape(self) -> StreamShape:
        """Shape of the job's chunks."""
        return StreamShape.of(self.model, self.chunk_length, self.sequence_parallel_size, self.micro_batch_size, HALF)

    @property
    def block_parameters(self) -> int:
        """Parameters of the largest block, not counting norms and biases."""
        return self.model.sizes.block_weights

    @property
    def mean_block_parameters(self) -> int:
        """Parameters of one block, the mean of all."""
        return self.model.sizes.all_block_weights // self.model.num_layers

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the word embedding, and of an untied output layer."""
        return self.padded_vocab_size * self.model.hidden_size

    @property
    def position_parameters(self) -> int:
        """Parameters of the position embedding; 0 with RoPE."""
        return self.model.sizes.outer_weights

    @property
    def output_parameters(self) -> int:
        """Parameters of the output layer; 0 where it is tied to the word embedding."""
        return self.embedding_parameters if self.model.untie_embeddings_and_output_weights else 0

    @property
    def num_parameters(self) -> int:
        """Parameters of the model."""
        adapters = self.model.sizes.adapters
        blocks = self.model.sizes.all_block_weights + (adapters.weights if adapters else 0)
        return self.embedding_parameters + self.position_parameters + blocks + self.output_parameters

    @property
    def trained_parameters(self) -> int:
        """Parameters that have gradients and optimizer states: all, or those of adapters."""
        adapters = self.model.sizes.adapters
        return self.num_parameters if adapters is None else adapters.weights

    @property
    def is_frozen(self) -> bool:
        """Whether adapters alone are trained."""
        return self.model.sizes.adapters is not None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that the model computes with, as they are stored."""
        adapters = self.model.sizes.adapters
        return HALF * self.num_parameters - _saved_by_nf4(adapters.quantized_weights if adapters else 0)

    @property
    def block_bytes(self) -> int:
        """Bytes of the weights of the largest block, without adapters."""
        adapters = self.model.sizes.adapters
        return HALF * self.block_parameters - _saved_by_nf4(adapters.quantized_block_weights if adapters else 0)

    @property
    def global_tokens(self) -> int:
        """Tokens of one optimizer step."""
        sequences = self.num_gpus // self.sequence_parallel_size * self.micro_batch_size * self.accumulation_steps
        return sequences * self.model.seq_length

    def at(self, seq_length: int, chunk_length: int | None = None) -> Job:
        """Return the same job at another sequence length and, if given, another chunk size."""
        model = replace(self.model, seq_length=seq_length, max_position_embeddings=seq_length)
        chunk_length = chunk_length or (self.chunk_length if self.streamed else seq_length)
        return replace(self, model=model, chunk_length=chunk_length)


def _saved_by_nf4(weights: int) -> int:
    return int((HALF - NF4) * weights)
