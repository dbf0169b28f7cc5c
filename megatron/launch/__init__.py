"""From the command line to a training run: checks, the choice of how to execute, exit codes."""
