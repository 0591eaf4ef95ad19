"""How gradients flow through a fixed point; the only custom autograd code."""

from idl.differentiation.base import AbstractAdjoint
from idl.differentiation.implicit import ImplicitAdjoint
from idl.differentiation.phantom import PhantomAdjoint
from idl.differentiation.unrolled import UnrolledAdjoint

__all__ = ["AbstractAdjoint", "ImplicitAdjoint", "PhantomAdjoint", "UnrolledAdjoint"]
