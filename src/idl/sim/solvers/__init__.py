"""Methods for the rows: one interface, each an immutable value."""

from idl.sim.solvers.admm import ADMM
from idl.sim.solvers.base import AbstractRowSolver, RowSolution
from idl.sim.solvers.hybrid import Hybrid

__all__ = ["ADMM", "AbstractRowSolver", "Hybrid", "RowSolution"]
