"""Rollback after a loss spike: return to the last checkpoint, and skip the data that led to the spike.

As in PaLM's training (arXiv 2204.02311, section 5.1): a spike comes from certain data meeting certain weights, so the
same weights get past it on other data. All ranks decide alike, since they look at the loss over all ranks.
"""

from __future__ import annotations

from dataclasses import replace

from megatron.checkpointing import choose_checkpoint, load_checkpoint
from megatron.checkpointing.train_state import TrainState
from megatron.config import Config, sample_lengths
from megatron.engine.engine import Engine
from megatron.initialize import Context
from megatron.monitoring.loss_window import LossWindow


class RollbackError(Exception):
    """The run may not roll back again, or has no checkpoint to return to."""


class Rollback:
    """Decides when a run rolls back, and does it. Without --rollback-on-loss-spike it never does."""

    def __init__(self, config: Config, engine: Engine, context: Context, losses: LossWindow) -> None:
        self._config, self._engine, self._context, self._losses = config, engine, context, losses
        self._reason: str | None = None
        # In fp16 a step that the loss scaler could no longer fix is not taken, so it cannot be rolled back.
        self.takes_faults = self._limit > 0 and not config.precision.fp16
        """Whether a step that is not finite causes a rollback."""

    def take_fault(self, reason: str) -> None:
        """Record a step that is not finite, before it is judged."""
        self._reason = reason

    def judge(self, iteration: int) -> bool:
        """Return whether to roll back the last step, whose loss is in the window. Waits for the device."""
        if self._limit and self._reason is None and not self._engine.step_was_skipped:
            self._reason = self._losses.warning(iteration)
        return self._reason is not None

    def go_back(self, state: TrainState) -> TrainState:
        """Load the newest checkpoint in --save; return its state, which skips the data that `state` has read.

        Collective over all ranks. RollbackError where the flag allows no more, or there is no checkpoint of this run.
        """
        reason, self._reason = self._reason, None
        if state.rollbacks >= self._limit:
            raise RollbackError(
                f"{reason}; the run has gone back {state.rollbacks} times, which is all that --rollback-on-loss-spike "
                f"({self._limit}) allows: raise it, or resume from a checkpoint with a lower --lr."
            )
        saved = self._load()
        if saved is None or saved.iteration > state.iteration:
            raise RollbackError(
                f"{reason}; --save ({self._config.checkpoint.save}) has no checkpoint of this run to go back to yet: "
                "lower --lr, or --save-interval."
            )
        lengths = sample_lengths(self._config, self._context.parallel_state.world_size)
        saved.start(lengths)
        first = saved.data_samples
        saved.leave_out_data_of(state)
        saved.enter(lengths.at(saved.data_samples))
        self._losses.forget_after(saved.iteration)
        self._context.log.warning(
            "%s; going back to iteration %d and on without samples %d to %d (rollback %d of %d)",
            reason, saved.iteration, first, saved.data_samples - 1, saved.rollbacks, self._limit,
        )  # fmt: skip
        return saved

    @property
    def _limit(self) -> int:
        return self._config.checkpoint.rollback_on_loss_spike or 0

    def _load(self) -> TrainState | None:
        """Load the newest checkpoint in --save in full, whatever flags the run itself was started with."""
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
