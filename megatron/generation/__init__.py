"""Generation from a trained model: prompt prefill chunk by chunk, then decoding token by token with a KV cache."""
