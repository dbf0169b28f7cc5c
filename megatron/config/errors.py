"""The error that a wrong setting raises."""


class ConfigError(ValueError):
    """A setting is missing, impossible or in conflict with another; the message is one line for its author."""
