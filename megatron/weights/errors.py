"""The error that unusable weights raise."""


class WeightsError(ValueError):
    """A folder of weights cannot be read or written, or is of an unsupported model; one line for its user."""
