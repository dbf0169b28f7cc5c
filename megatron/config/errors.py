"""The error for an invalid setting."""


class ConfigError(ValueError):
    """A setting is missing, invalid or in conflict with another; the message is one line for the user."""
