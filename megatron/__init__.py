"""Ulysses-Offload: GPT and LLaMA trained on ultra-long contexts with the Fully Pipelined Distributed Transformer."""

__version__ = "0.1.0"
