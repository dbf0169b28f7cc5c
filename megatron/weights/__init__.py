"""Weights in files that other programs read: safetensors, and other programs' names for the same parameters."""
