"""GPT and LLaMA models from the same modules; only `builder` chooses how they are executed."""
