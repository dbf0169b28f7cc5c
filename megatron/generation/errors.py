"""The error that a prompt raises which cannot be gone on with."""


class GenerationError(ValueError):
    """A prompt or a setting of sampling is unusable; the message is one line for the person who gave it."""
