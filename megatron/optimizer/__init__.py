"""Optimizer inputs: parameter groups and the learning rate of each step."""

from megatron.optimizer.param_groups import parameter_groups
from megatron.optimizer.schedule import LearningRateSchedule, ScheduleError, learning_rate

__all__ = ["LearningRateSchedule", "ScheduleError", "learning_rate", "parameter_groups"]
