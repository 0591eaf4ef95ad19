"""How a fixed point is found: solvers, the one loop that runs them, and what a solver may ask of a map."""

from idl.solvers.adaptive import Adaptive
from idl.solvers.anderson import Anderson
from idl.solvers.base import AbstractFixedPointSolver, Solution
from idl.solvers.newton import Newton
from idl.solvers.picard import Picard
from idl.solvers.substitution import BackSubstitution

__all__ = [
    "AbstractFixedPointSolver",
    "Adaptive",
    "Anderson",
    "BackSubstitution",
    "Newton",
    "Picard",
    "Solution",
]
