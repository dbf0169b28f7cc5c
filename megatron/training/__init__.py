"""The training loop: its steps, its length, and the rollback after a loss spike."""
