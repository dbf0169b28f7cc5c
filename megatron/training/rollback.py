"""Going back to the last checkpoint from a loss that spikes, and on behind the data that led to it.

What PaLM's training did (arXiv 2204.02311, section 5.1): a spike comes of certain data meeting certain weights, so that
the same weights with other data pass it. All ranks decide alike, as the loss that they look at is that of all of them.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from megatron.checkpointing import choose_checkpoint, load_checkpoint
from megatron.checkpointing.train_state import TrainState
from megatron.config import Config, global_batch_size
from megatron.engine.engine import Engine
from megatron.initialize import Context
from megatron.logging.loss_watch import LossWatch


class RollbackError(Exception):
    """The run is not to go back again, or has nothing to go back to."""


class Rollback:
    """When a run goes back, and how. Without --rollback-on-loss-spike it never does."""

    def __init__(self, config: Config, engine: Engine, context: Context) -> None:
        self._config, self._engine, self._context = config, engine, context
        self._watch = LossWatch(config.logging.loss_spike_factor)
        self._reason: str | None = None
        # In fp16 a step that the scaler could no longer mend is not taken, and so cannot be taken back.
        self.takes_faults = self._limit > 0 and not config.precision.fp16
        """Whether it mends a step that is not finite."""

    def take_fault(self, reason: str) -> None:
        """Hear of a step that is not finite, before it is judged."""
        self._reason = reason

    def judge(self, iteration: int, loss: Tensor) -> bool:
        """Whether the step just taken is to be taken back; `loss` is its mean over all ranks. Waits for the device."""
        if self._limit and self._reason is None and not self._engine.step_was_skipped:
            self._reason = self._watch.look(iteration, loss.item())
        return self._reason is not None

    def go_back(self, state: TrainState) -> TrainState:
        """Load the newest checkpoint in --save; returns its state, with the data that `state` has read left out.

        Collective over all ranks. RollbackError where the flag allows no more, or there is no checkpoint of this run.
        """
        reason, self._reason = self._reason, None
        if state.rollbacks >= self._limit:
            raise RollbackError(
                f"{reason}; the run has gone back {state.rollbacks} times, which is all that --rollback-on-loss-spike "
                f"({self._limit}) allows: raise it, or go on from a checkpoint with a lower --lr."
            )
        saved = self._load()
        if saved is None or saved.iteration > state.iteration:
            raise RollbackError(
                f"{reason}; --save ({self._config.checkpoint.save}) has no checkpoint of this run to go back to yet: "
                "lower --lr, or --save-interval."
            )
        world_size = self._context.parallel_state.world_size
        saved.start(global_batch_size(self._config, world_size), self._config.model.seq_length)
        first = saved.data_samples
        saved.leave_out_data_of(state)
        self._watch.forget_after(saved.iteration)
        self._context.log.warning(
            "%s; going back to iteration %d and on without samples %d to %d (rollback %d of %d)",
            reason, saved.iteration, first, saved.data_samples - 1, saved.rollbacks, self._limit,
        )  # fmt: skip
        return saved

    @property
    def _limit(self) -> int:
        return self._config.checkpoint.rollback_on_loss_spike or 0

    def _load(self) -> TrainState | None:
        """All of the newest checkpoint in --save, whatever the run itself was begun with."""
        settings = replace(
            self._config.checkpoint,
            load=self._config.checkpoint.save,
            ckpt_step=None,
            finetune=False,
            no_load_optim=False,
            no_load_rng=False,
            universal_checkpoint=False,
        )
        path = choose_checkpoint(settings, self._context)
        if path is None:
            return None
        return load_checkpoint(path, self._engine, self._context, replace(self._config, checkpoint=settings))
