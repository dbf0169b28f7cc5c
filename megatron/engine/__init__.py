"""DeepSpeed, and nothing else that knows of it."""
