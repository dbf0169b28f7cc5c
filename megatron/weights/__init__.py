"""Weights as files that other programs read: safetensors, and what other programs call the same parameters."""
