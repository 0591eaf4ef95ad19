"""Every class of error and warning that the library raises; no logic."""


class ConvergenceError(RuntimeError):
    """Some sample has no fixed point to the asked accuracy, and ``on_failure="raise"``."""


class ConvergenceWarning(RuntimeWarning):
    """Some sample has no fixed point to the asked accuracy; the best iterate was returned."""


class CaptureError(ValueError):
    """A teacher uses an operation that has no place in an implicit model."""
