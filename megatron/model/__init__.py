"""GPT and LLaMA from the same modules; how they are executed is chosen in `builder` alone."""
