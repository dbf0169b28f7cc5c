"""Optimizer inputs: parameter groups and the learning rate of each step."""

from megatron.optimizer.param_groups import parameter_groups
from megatron.optimizer.schedule import LearningRateSchedule, ScheduleError

__all__ = ["LearningRateSchedule", "ScheduleError", "parameter_groups"]
