"""Planner: estimates of the memory of a training job and the time of a step, before anything is allocated."""
