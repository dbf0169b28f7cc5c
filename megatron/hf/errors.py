"""The error of a Hugging Face model that cannot be streamed."""


class UnsupportedModelError(ValueError):
    """A model does something that the stream would compute wrongly; the message names it."""
