"""Flags that Megatron's launch scripts pass and that have no meaning here, and names that differ.

A flag is accepted when what it asks for is already so; a flag that asks for something else is an error.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class UpstreamFlag:
    """One flag that is accepted and only noted; `values` is () for a switch, `ANY` for a flag with any value."""

    name: str
    why: str
    values: tuple[str, ...] = ()


ANY = ("...",)

UPSTREAM_FLAGS = (
    UpstreamFlag("override-opt-param-scheduler", "the learning-rate schedule always follows the flags"),
    UpstreamFlag("no-query-key-layer-scaling", "attention scores are never scaled by the layer number"),
    UpstreamFlag("no-masked-softmax-fusion", "there is no such fused kernel"),
    UpstreamFlag("no-bias-gelu-fusion", "there is no such fused kernel"),
    UpstreamFlag("no-bias-dropout-fusion", "there is no such fused kernel"),
    UpstreamFlag("no-gradient-accumulation-fusion", "there is no such fused kernel"),
    UpstreamFlag("no-async-tensor-model-parallel-allreduce", "there is no tensor parallelism"),
    UpstreamFlag("distributed-backend", "NCCL on GPUs, gloo on CPUs", ("nccl", "gloo")),
    UpstreamFlag("DDP-impl", "DeepSpeed reduces the gradients", ("local", "torch")),
    UpstreamFlag("data-impl", "datasets are memory-mapped", ("mmap", "infer")),
    UpstreamFlag("num-workers", "one thread reads ahead, as far as --prefetch-microbatches says", ANY),
    UpstreamFlag("optimizer", "the optimizer is Adam", ("adam",)),
    UpstreamFlag("tensorboard-queue-size", "TensorBoard's writer uses its default", ANY),
    UpstreamFlag("log-timers-to-tensorboard", "TensorBoard gets what the log line has"),
    UpstreamFlag("log-batch-size-to-tensorboard", "TensorBoard gets what the log line has"),
    UpstreamFlag("log-validation-ppl-to-tensorboard", "TensorBoard gets what the log line has"),
)

# Unknown flag: the flag here that does its work.
OTHER_NAMES = {
    "context-parallel-size": "ds-sequence-parallel-size",
    "group-query-attention": "num-key-value-heads",
    "norm-epsilon": "layernorm-epsilon",
    "num-query-groups": "num-key-value-heads",
    "position-embedding-type": "use-rotary-position-embeddings",
    "recompute-activations": "deepspeed-activation-checkpointing",
    "recompute-granularity": "deepspeed-activation-checkpointing",
    "recompute-method": "deepspeed-activation-checkpointing",
    "rotary-seq-len-interpolation-factor": "rope-scaling-type",
    "rotary-base": "rotary-position-embeddings-theta",
    "sequence-parallel": "ds-sequence-parallel-size",
    "use-rope-scaling": "rope-scaling-type",
}
