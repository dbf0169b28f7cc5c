"""The error that an evaluation raises which cannot be made."""


class EvaluationError(ValueError):
    """Lengths, data or vocabulary do not go together; the message is one line for the person who gave them."""
