"""Monitoring of a training run: finite values, speed, memory, losses by position."""
