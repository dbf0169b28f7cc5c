"""Hugging Face decoders through the stream."""
