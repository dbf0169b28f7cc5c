"""The error for a prompt that cannot be continued."""


class GenerationError(ValueError):
    """A prompt or a sampling option is unusable; the message is one line for the user."""
