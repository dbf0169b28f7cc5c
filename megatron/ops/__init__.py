"""Operators on tensors of one device: attention tiles, their merge, linear layers, SwiGLU, RoPE, cross-entropy."""
