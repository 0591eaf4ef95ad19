"""Methods for the rows: one interface, each an immutable value."""

from idl.sim.problem import RowProblem
from idl.sim.solvers.admm import ADMM
from idl.sim.solvers.base import AbstractRowSolver, RowSolution
from idl.sim.solvers.cardinality import Cardinality
from idl.sim.solvers.consensus import ConsensusADMM
from idl.sim.solvers.coordinate import CoordinateDescent
from idl.sim.solvers.cvx import CVX
from idl.sim.solvers.exact import ExactMatching
from idl.sim.solvers.gradient import AcceleratedGradient
from idl.sim.solvers.hybrid import Hybrid
from idl.sim.solvers.least_squares import LeastSquares

__all__ = [
    "ADMM",
    "CVX",
    "AbstractRowSolver",
    "AcceleratedGradient",
    "Cardinality",
    "ConsensusADMM",
    "CoordinateDescent",
    "ExactMatching",
    "Hybrid",
    "LeastSquares",
    "RowProblem",
    "RowSolution",
]
