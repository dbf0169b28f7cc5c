"""Logging: log lines, progress, loss spikes, metric writers and the history of a run."""
