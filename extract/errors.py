"""What may go wrong with weights."""


class WeightsUnavailableError(RuntimeError):
    """Weights that cannot be had; the message says what to do."""
