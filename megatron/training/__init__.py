"""The training loop: its steps, its length, and going back after a loss spike."""
