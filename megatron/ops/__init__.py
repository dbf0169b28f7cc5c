"""Arithmetic on tensors of one device: attention tiles, their merge, norms and rotary embedding."""
