"""The error for an evaluation that cannot run."""


class EvaluationError(ValueError):
    """Lengths, data or vocabulary do not fit together; the message is one line for the user."""
