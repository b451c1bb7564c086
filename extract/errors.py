"""What may go wrong with weights, and on a GPU."""

#: Exit code when weights cannot be had, so that a script can go on with others.
WEIGHTS_UNAVAILABLE = 3


class WeightsUnavailableError(RuntimeError):
    """Weights that cannot be had; the message says what to do."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether a GPU had not enough memory."""
    import torch  # takes seconds; what fails without it imports this module, too

    return isinstance(error, torch.OutOfMemoryError)
