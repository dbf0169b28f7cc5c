"""The flags of Megatron-DeepSpeed that are not flags here, and how each is handled.

    ACCEPTED       asks for the behavior here, or concerns only the other program's internals: noted in the log
    OTHER_NAMES    an error that names the flag to use instead
    REFUSED        an error: it would change the result, and cannot be honored
    ALIASES        another spelling of a flag here

Flags that mean the same in both programs are fields of the configuration.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Accepted:
    """One flag that is accepted, and only noted in the log.

    `values` is () for a switch, `ANY` for a flag with any value, else the values that are accepted; `otherwise` says
    why any other value is not, and what to do.
    """

    name: str
    why: str
    values: tuple[str, ...] = ()
    otherwise: str = ""


@dataclass(frozen=True)
class Refused:
    """One flag that cannot be honored: why, and what to do instead; without `advice`, remove the flag."""

    name: str
    why: str
    advice: str = ""


ANY = ("...",)


def _switches(why: str, *names: str) -> Iterator[Accepted]:
    return (Accepted(name, why) for name in names)


def _valued(why: str, *names: str) -> Iterator[Accepted]:
    return (Accepted(name, why, ANY) for name in names)


def _refused(why: str, *names: str, advice: str = "") -> Iterator[Refused]:
    return (Refused(name, why, advice) for name in names)


NO_TENSOR_PARALLELISM = "there is no tensor parallelism"
NO_PIPELINE = "there is no pipeline parallelism"
NO_EXPERTS = "there are no experts"
NO_FP8 = "there is no FP8"
NO_SUCH_KERNEL = "there is no such fused kernel"
LOGGED = "the log and TensorBoard have what the log line has, and this is not in it"
MEMORY_OF_BLOCKS = "it changes memory only; --deepspeed-activation-checkpointing recomputes each block"
DEEPSPEED_JSON_SAYS = "the DeepSpeed JSON says how ZeRO reduces and gathers"
EXACT_ATTENTION = "attention is exact with every kernel; --attention-backend chooses it"

ACCEPTED = (
    # learning rate and optimizer
    Accepted("override-opt-param-scheduler", "the learning-rate schedule always follows the flags"),
    Accepted("optimizer", "the optimizer is Adam", ("adam",), "there is no other optimizer; remove --optimizer"),
    *_valued("the optimizer is Adam", "sgd-momentum"),
    *_switches("the fastest available Adam is used, and all compute the same", "torch-adam", "ds-fused-adam"),
    Accepted(
        "weight-decay-incr-style",
        "the weight decay is constant",
        ("constant",),
        "the weight decay is constant here; use --weight-decay alone",
    ),
    # kernels
    Accepted("no-query-key-layer-scaling", "attention scores are never scaled by the layer number"),
    Accepted("attention-softmax-in-fp32", "the softmax is always computed in fp32"),
    *_switches(EXACT_ATTENTION, "use-flash-attn-v1", "use-flash-attn-triton", "use-flash-attn-builder"),
    *_switches(
        NO_SUCH_KERNEL,
        *("no-masked-softmax-fusion", "no-bias-gelu-fusion", "no-bias-dropout-fusion"),
        *("no-gradient-accumulation-fusion", "no-persist-layer-norm", "disable-mem-efficient-ln"),
    ),
    *_valued("nothing is exported to ONNX", "onnx-safe"),
    Accepted(
        "transformer-impl",
        "layers are those of torch and of this program",
        ("local",),
        "there is no Transformer Engine here; use --transformer-impl local",
    ),
    *_switches(NO_FP8, "no-fp8-wgrad"),
    *_valued(NO_FP8, "fp8-margin", "fp8-interval", "fp8-amax-history-len", "fp8-amax-compute-algo"),
    # ranks
    *_switches(
        NO_TENSOR_PARALLELISM,
        *("no-async-tensor-model-parallel-allreduce", "distribute-saved-activations"),
        *("distribute-checkpointed-activations", "partition-activations", "scattered-embeddings"),
    ),
    Accepted(
        "sequence-parallel",
        f"{NO_TENSOR_PARALLELISM}, of which it is a part; --ds-sequence-parallel-size shards a sequence",
    ),
    *_switches("a sequence-parallel size of 1 uses the same code as any other", "force-ds-sequence-parallel"),
    *_switches(
        NO_PIPELINE,
        *("overlap-p2p-communication", "no-scatter-gather-tensors-in-pipeline", "use-ring-exchange-p2p"),
        *("standalone-embedding-stage", "enable-zbh1-pipeline", "enable-zbh1-exact-semantics"),
    ),
    *_valued(NO_PIPELINE, "pipeline-model-parallel-split-rank"),
    Accepted("distributed-backend", "NCCL on GPUs, gloo on CPUs", ("nccl", "gloo")),
    Accepted("DDP-impl", "DeepSpeed reduces the gradients", ("local", "torch")),
    *_switches("DeepSpeed reduces the gradients", "no-contiguous-buffers-in-local-ddp"),
    *_switches("--zero-stage says what is partitioned", "use-distributed-optimizer"),
    *_switches(
        "weights are initialized where they are trained, the same for any number of ranks", "use-cpu-initialization"
    ),
    Accepted("no-initialization", "weights are initialized, then replaced by those of a checkpoint"),
    # memory
    Accepted("recompute-activations", "no attention kernel saves its probabilities for backward"),
    *_valued(MEMORY_OF_BLOCKS, "recompute-method", "recompute-num-layers", "checkpoint-num-layers"),
    *_switches(MEMORY_OF_BLOCKS, "split-transformers", "contigious-checkpointing", "synchronize-each-layer"),
    *_switches("FPDT bounds the memory of a block", "memory-centric-tiled-linear"),
    *_valued("FPDT bounds the memory of a block", "tile-factor"),
    *_valued("the allocator's cache is left alone", "empty-unused-memory-level"),
    *_switches(DEEPSPEED_JSON_SAYS, "zero-reduce-scatter", "zero-contigious-gradients", "use-pin-memory"),
    *_valued(DEEPSPEED_JSON_SAYS, "zero-reduce-bucket-size", "zero-allgather-bucket-size"),
    Accepted(
        "remote-device",
        DEEPSPEED_JSON_SAYS,
        ("none",),
        'the DeepSpeed JSON says it; write "zero_optimization": {"offload_param": {"device": "cpu"}} there',
    ),
    # data
    *(Accepted(name, "datasets are memory-mapped", ("mmap", "infer")) for name in ("data-impl", "dataset-impl")),
    *_switches("datasets are memory-mapped", "mmap-warmup"),
    *_valued("one thread prefetches --prefetch-microbatches micro-batches", "num-workers"),
    Accepted(
        "dataloader-type",
        "samples come in a shuffled order, once per epoch",
        ("single",),
        "there is no second shuffling of the samples; use --dataloader-type single",
    ),
    *_switches("the data is repeated after its last sample", "repeated-dataloader"),
    *_switches("only data efficiency, which is not here, uses it", "return-data-index"),
    Accepted("vocab-extra-ids", "no ids are added", ("0",), "they are T5's; use --vocab-extra-ids 0"),
    Accepted("sample-rate", "all samples are used", ("1", "1.0"), "all samples are used here; use --sample-rate 1"),
    *_switches("no code from a model's folder is executed", "trust-remote-code"),
    # checkpoints
    Accepted(
        "no-save-optim", "a checkpoint always has optimizer states; tools/consolidate_checkpoint.py leaves them out"
    ),
    Accepted("no-save-rng", "a checkpoint always has the random state"),
    *_valued("checkpoints are written by one writer", "checkpoint-io-buffer-size", "checkpoint-data-parallel"),
    *_valued("checkpoints are written by one writer", "aio-intra-op-parallelism"),
    *_switches("checkpoints are written by one writer", "checkpoint-writer-decoupled"),
    # logging
    *_switches(
        "TensorBoard gets what the log line has",
        *("log-timers-to-tensorboard", "log-batch-size-to-tensorboard", "log-validation-ppl-to-tensorboard"),
        *("no-log-learnig-rate-to-tensorboard", "no-log-loss-scale-to-tensorboard"),
    ),
    *_switches(
        LOGGED,
        *("log-optimizer-states-to-tensorboard", "log-memory-to-tensorboard", "log-world-size-to-tensorboard"),
        *("log-params-norm", "log-num-zeros-in-grad"),
    ),
    *_valued("TensorBoard's writer uses its default", "tensorboard-queue-size"),
    *_valued("TensorBoard gets a point per --log-interval", "tensorboard-log-interval"),
    *_valued("--profile says where the time goes", "timing-log-level", "timing-log-option"),
    *_switches("--profile says where the time goes", "no-barrier-with-level-1-timing", "profile-backward"),
    *_valued("there is no such cluster service", "adlr-autoresume-interval"),
    # parts of models and programs that are not here
    Accepted(
        "num-experts",
        NO_EXPERTS,
        ("1",),
        "there is no mixture of experts here; use --num-experts 1 for the dense model",
    ),
    *_valued(
        NO_EXPERTS,
        *("mlp-type", "topk", "expert-interval", "moe-expert-parallel-size", "num-local-experts"),
        *("moe-train-capacity-factor", "moe-eval-capacity-factor", "moe-min-capacity", "moe-loss-coeff"),
    ),
    *_switches(
        NO_EXPERTS,
        *("disable-moe-token-dropping", "disable-moe-top2-2nd-expert-sampling", "create-moe-param-group"),
        *("use-tutel", "enable-expert-tensor-parallelism"),
    ),
    *_switches("it is BERT's", "bert-no-binary-head"),
    *_valued("it is BERT's", "mask-prob", "short-seq-prob"),
    *_valued("it is for retrieval models", "retriever-seq-length"),
    *_valued("it is for inference servers", "inference-batch-times-seqlen-threshold", "max-tokens-to-oom"),
)

OTHER_NAMES = {
    "batch-size": "micro-batch-size",
    "context-parallel-size": "ds-sequence-parallel-size",
    "group-query-attention": "num-key-value-heads",
    "model-parallel-size": "tensor-model-parallel-size",
    "norm-epsilon": "layernorm-epsilon",
    "num-query-groups": "num-key-value-heads",
    "reset-iteration": "finetune",
    "rotary-base": "rotary-position-embeddings-theta",
    "warmup": "lr-warmup-fraction",
    "yaml-cfg": "config",
}

REFUSED = (
    # model
    *_refused("there are no encoder-decoder models here", "decoder-num-layers", "decoder-seq-length"),
    *_refused("norms are before attention and MLP here", "apply-residual-connection-post-layernorm"),
    *_refused("a norm's weight is stored directly here, and has no weight decay", "apply-layernorm-1p"),
    *_refused("there is no squared ReLU here", "squared-relu", advice="remove it for GELU, or use --swiglu"),
    *_refused("there is no mixture of experts here", "num-experts-switch"),
    *_refused("embeddings have the run's number format", "embedding-weights-in-fp32"),
    *_refused("the residual stream has the run's number format", "fp32-residual-connection"),
    *_refused("the loss is always computed in fp32", "fp16-lm-cross-entropy"),
    *_refused("there is no FP8 here", "fp8-e4m3", "fp8-hybrid", advice="use --bf16"),
    *_refused(
        "weights are initialized from a normal distribution here",
        "init-method-xavier-uniform",
        advice="use --init-method-std",
    ),
    *_refused("all ranks start with the same weights", "data-parallel-random-init"),
    *_refused(
        "the kind of position embedding is a switch here",
        "position-embedding-type",
        advice="use --use-rotary-position-embeddings for rope, or nothing for learned positions",
    ),
    *_refused(
        "RoPE's scaling has a type and a factor here",
        "rotary-seq-len-interpolation-factor",
        advice="use --rope-scaling-type linear --rope-scaling-factor X",
    ),
    *_refused(
        "RoPE's scaling has a type and a factor here",
        "use-rope-scaling",
        advice="use --rope-scaling-type llama3, --rope-scaling-factor and "
        "--rope-scaling-original-max-position-embeddings",
    ),
    # training
    *_refused(
        "the weight decay is constant here", "start-weight-decay", "end-weight-decay", advice="use --weight-decay"
    ),
    *_refused("the batch size is constant here", "rampup-batch-size", advice="use --global-batch-size alone"),
    *_refused("no tokens are dropped here", "random-ltd"),
    *_refused(
        "no curriculum truncates samples here",
        *("data-efficiency-curriculum-learning", "curriculum-learning", "curriculum-learning-legacy"),
        advice="use --seq-length-schedule, which cuts the data to the length of each step and reads all of it",
    ),
    *_refused(
        "this program trains", "skip-train", "inference", "ds-inference", advice="use tools/eval_long_context.py"
    ),
    *_refused("this program trains by itself", "use-dataset-only", "lazy-mpu-init"),
    *_refused(
        "DeepSpeed reduces the gradients in the format that its JSON says",
        "accumulate-allreduce-grads-in-fp32",
        advice='write "communication_data_type": "fp32" and "data_types": {"grad_accum_dtype": "fp32"} there',
    ),
    *_refused("there is no pipeline parallelism here", "num-layers-per-virtual-pipeline-stage"),
    *_refused(
        "a run ends by a signal", "kill-switch-file", "adlr-autoresume", advice="send SIGTERM, which saves and exits"
    ),
    # checkpoints
    *_refused(
        "the learning-rate schedule always follows the flags",
        *("use-checkpoint-opt-param-scheduler", "no-load-lr-state"),
        advice="give the schedule by its flags, or restart it with --finetune",
    ),
    *_refused("the flags define the model", "use-checkpoint-args", advice="give the flags of the run that saved it"),
    # data
    *_refused("paths are used as they are", "aml-data-download-path", advice="give whole paths to --data-path"),
    *_refused(
        "the order of the samples follows from --seed and the length of the training",
        *("train-data-exact-num-epochs", "train-idx-path", "train-desc-path", "train-doc-idx-path"),
        *("train-sample-idx-path", "train-shuffle-idx-path"),
    ),
    # programs and models that are not here
    *_refused(
        "there is no distillation here",
        *("mos", "kd", "kd-alpha-ce", "kd-beta-ce", "kd-temp", "load-teacher", "num-layers-teacher"),
        *("num-experts-teacher", "hidden-size-teacher", "num-attention-heads-teacher"),
    ),
    *_refused("there is no BERT here", "output-bert-embeddings", "bert-embedder-type", "bert-load"),
    *_refused(
        "there are no retrieval models here",
        *("retro-workdir", "retro-add-retriever", "retro-cyclic-train-iters", "retro-encoder-layers"),
        *("retro-encoder-hidden-dropout", "retro-encoder-attention-dropout", "retro-num-neighbors"),
        *("retro-num-retrieved-chunks", "retro-return-doc-ids", "ict-head-size", "biencoder-projection-dim"),
        *("biencoder-shared-query-context-model", "ict-load", "titles-data-path", "query-in-block-prob"),
        *("use-one-sent-docs", "evidence-data-path", "retriever-report-topk-accuracies"),
        *("retriever-score-scaling", "block-data-path", "embedding-path", "indexer-batch-size"),
        "indexer-log-interval",
    ),
    *_refused(
        "there are no vision models here",
        *("num-classes", "img-h", "img-w", "num-channels", "patch-dim", "classes-fraction"),
        *("data-per-class-fraction", "no-data-sharding", "head-lr-mult", "vision-pretraining"),
        *("vision-pretraining-type", "vision-backbone-type", "swin-backbone-type", "mask-type", "mask-factor"),
        *("iter-per-epoch", "dino-local-img-size", "dino-local-crops-number", "dino-head-hidden-size"),
        *("dino-bottleneck-size", "dino-freeze-last-layer", "dino-norm-last-layer", "dino-warmup-teacher-temp"),
        *("dino-teacher-temp", "dino-warmup-teacher-temp-epochs"),
    ),
)

ALIASES = {
    "deepscale": "deepspeed",
    "deepscale-config": "deepspeed-config",
    "encoder-num-layers": "num-layers",
    "encoder-seq-length": "seq-length",
}
