"""Evaluation of how well a model uses a long context: loss by context length, needles, and RULER's tasks."""
