"""The error that unusable data raises."""


class DataError(ValueError):
    """A data file, or a request for it, is unusable; the message is one line for the person who gave it."""
