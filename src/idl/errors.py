"""Every class of error and warning that the library raises; no logic."""


class ConvergenceError(RuntimeError):
    """Some sample has no fixed point to the asked accuracy, and ``on_failure="raise"``.

    Example:
        >>> import torch
        >>> from idl import fixed_point
        >>> try:
        ...     fixed_point(lambda x: x + 1, torch.tensor(0.0), on_failure="raise")
        ... except ConvergenceError as error:
        ...     print(str(error)[:33])
        Adaptive stopped after 300 steps:
    """


class ConvergenceWarning(RuntimeWarning):
    """Some sample has no fixed point to the asked accuracy; the best iterate was returned.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", ConvergenceWarning)  # from now on an error where it happens
    """


class CaptureError(ValueError):
    """A teacher uses an operation that has no place in an implicit model."""
