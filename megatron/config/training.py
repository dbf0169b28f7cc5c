"""Settings for batches, training length, evaluation and exit."""

from dataclasses import dataclass

DEFAULT_EVAL_INTERVAL = 1000


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training."""

    micro_batch_size: int = 1
    """Sequences per forward pass on each group of sequence-parallel ranks."""

    global_batch_size: int | None = None
    """Sequences per optimizer step. Default: --micro-batch-size x data-parallel size."""

    train_iters: int | None = None
    """Train this many iterations. Give at least one of --train-iters, --train-samples and --train-tokens; training ends
    when the first of them is reached. What a resumed run has consumed counts, at the batch and length of that time."""

    train_samples: int | None = None
    """Train on at most this many sequences, in whole global batches."""

    train_tokens: int | None = None
    """Train on at most this many tokens, in whole global batches."""

    seq_length_schedule: str | None = None
    """Lengths of the training sequences and how many iterations each is trained at, such as 32K:1000,128K:500,1M; the
    last lasts to the end, and the longest is --seq-length. Each length continues in the data where the one before
    ended. Default: --seq-length throughout."""

    seed: int = 1234
    """Seed of the weights, of dropout and of the data order."""

    deterministic_mode: bool = False
    """Use only kernels that give the same bits each time, so that the same run on the same GPUs gives the same weights,
    also if it is resumed in between. Costs some speed."""

    eval_iters: int = 100
    """Batches per evaluation; 0 turns evaluation off."""

    eval_interval: int | None = None
    """Iterations between evaluations. Default: 1000; none with --eval-interval-mins."""

    eval_interval_mins: float | None = None
    """Minutes between evaluations, which follow the step in which the time is up; with --eval-interval whichever comes
    first."""

    exit_interval: int | None = None
    """Exit at the next iteration that is a multiple of this, saving first if --save is given."""

    exit_duration_in_mins: int | None = None
    """Exit after this many minutes, saving first if --save is given."""

    no_check_for_nan_in_loss_and_grad: bool = False
    """Continue when the loss or the gradient of a step is not finite. Without this flag the run ends before the
    optimizer step, and reports which rank, layer, pass and chunk had the first non-finite value."""

    exit_signal_handler: bool = False
    """Accepted for Megatron's scripts; SIGTERM always saves (if --save is given) and exits."""

    @property
    def evaluation_interval(self) -> int | None:
        """Iterations between evaluations, given or by default; None for evaluations by time alone."""
        if self.eval_interval is None and self.eval_interval_mins is None:
            return DEFAULT_EVAL_INTERVAL
        return self.eval_interval
