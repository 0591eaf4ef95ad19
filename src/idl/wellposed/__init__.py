"""Which state matrices are allowed: maps from free parameters to admissible matrices, applied before the solve.

A constraint of one's own returns ``Dense(A)``, or ``Factored(L, R)`` for ``A = L R^T``.
"""

from idl.linalg.operators import Dense, Factored
from idl.wellposed.base import AbstractConstraint, Free
from idl.wellposed.inf_norm import InfNorm, InfNormProjection
from idl.wellposed.triangular import StrictlyTriangular

__all__ = ["AbstractConstraint", "Dense", "Factored", "Free", "InfNorm", "InfNormProjection", "StrictlyTriangular"]
