"""The DeepSpeed engine; no other package imports DeepSpeed."""
