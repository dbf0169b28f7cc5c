"""Text from a trained model: a prompt prefilled chunk by chunk, then one token at a time over what is cached."""
