"""Implicit deep learning: models whose hidden state is an equilibrium."""

from idl.activations import Activation
from idl.differentiation import ImplicitAdjoint, PhantomAdjoint, UnrolledAdjoint
from idl.equilibrium import equilibrium
from idl.errors import ConvergenceError, ConvergenceWarning
from idl.fixed_points import fixed_point
from idl.functions import ImplicitFunction, ImplicitFunctionInf, ImplicitFunctionTriu
from idl.nn import IDLAttention, IDLHead, ImplicitModel, ImplicitRNN, ImplicitRNNCell
from idl.sim import SIM
from idl.solvers import Adaptive, Anderson, BackSubstitution, Newton, Picard, Solution
from idl.wellposed import Free, InfNorm, InfNormProjection, StrictlyTriangular

__version__ = "0.1.0"

__all__ = [
    "SIM",
    "Activation",
    "Adaptive",
    "Anderson",
    "BackSubstitution",
    "ConvergenceError",
    "ConvergenceWarning",
    "Free",
    "IDLAttention",
    "IDLHead",
    "ImplicitAdjoint",
    "ImplicitFunction",
    "ImplicitFunctionInf",
    "ImplicitFunctionTriu",
    "ImplicitModel",
    "ImplicitRNN",
    "ImplicitRNNCell",
    "InfNorm",
    "InfNormProjection",
    "Newton",
    "PhantomAdjoint",
    "Picard",
    "Solution",
    "StrictlyTriangular",
    "UnrolledAdjoint",
    "equilibrium",
    "fixed_point",
]
