"""The error that an unusable tokenizer raises."""


class TokenizerError(ValueError):
    """A tokenizer is unknown, incomplete or unreadable; the message is one line for the user."""
