"""Hugging Face models: their settings, and all that lets an ordinary transformers model be streamed."""
