"""RULER's tasks (arXiv 2404.06654), built from local text at any length, and their scores."""
