"""Each tolerance of the tests, explained once."""

SOLVE = 1e-13
"""What float64 solves are asked for: absolute in the forward, relative to the source in a derivative's solve."""

FLOAT64 = 1e-9
"""Two float64 results that rest on solves to ``SOLVE``. The maps of the table contract by 0.4, so that a solve errs by
1e-13 / (1 - 0.4); a second derivative multiplies three such solves and sums some hundred terms of size up to ten."""

EPS, FINITE_DIFFERENCE = 1e-6, 1e-5
"""Step and error of central differences: truncation EPS**2 times a third derivative, plus SOLVE / EPS = 1e-7."""

DIRECTION = 1e-4
"""What is promised of a gradient's direction whatever the scale of the loss, in float32 with the default settings."""

FLOAT32 = 1e-4
"""Relative error of float32 results with the default settings: tol = grad_tol = 3e-6, over 1 - 0.4, for the value and
again for the gradient."""

BFLOAT16 = 0.02
"""Relative error, in the 2-norm, of bfloat16 results against those of the same rounded parameters in float64: each
product rounds to 8 bits (2**-8 = 0.004); the products before and after the solve, and the result, are rounded."""


def relative_error(value, truth):
    """Return the 2-norm of the difference over that of ``truth``, both of any dtype."""
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm())
