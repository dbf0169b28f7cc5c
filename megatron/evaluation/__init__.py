"""Evaluation of how well a model uses a long context: loss by context length, and needle in a haystack."""
