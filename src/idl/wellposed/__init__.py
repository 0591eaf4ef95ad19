"""Which state matrices are allowed: maps from free parameters to admissible matrices, applied before the solve."""

from idl.wellposed.base import AbstractConstraint, Free
from idl.wellposed.inf_norm import InfNorm, InfNormProjection
from idl.wellposed.triangular import StrictlyTriangular

__all__ = ["AbstractConstraint", "Free", "InfNorm", "InfNormProjection", "StrictlyTriangular"]
