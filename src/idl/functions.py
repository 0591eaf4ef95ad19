"""Implicit functions: named compositions of activation, constraint, solver and adjoint, a few lines each."""

from collections.abc import Callable

import torch
from torch import Tensor

from idl import activations, checks
from idl.activations import Activation
from idl.differentiation.base import AbstractAdjoint, OnFailure
from idl.differentiation.implicit import ImplicitAdjoint
from idl.equilibrium import Attempt, attempt, check_tensors
from idl.linalg.operators import StateMatrix
from idl.recurrence.timeline import Timeline
from idl.sequence import Trajectory, solve_sequence
from idl.solvers.adaptive import Adaptive
from idl.solvers.base import AbstractFixedPointSolver, Solution
from idl.solvers.substitution import BackSubstitution
from idl.transforms import eagerly
from idl.wellposed.base import AbstractConstraint, Free
from idl.wellposed.inf_norm import InfNorm
from idl.wellposed.triangular import StrictlyTriangular

StateParameters = Tensor | tuple[Tensor, Tensor] | StateMatrix
"""The free parameter of a state matrix: ``A`` of shape ``(n, n)``, or factors ``(L, R)``, each ``(n, r)``.

Or a state matrix that is known to be admissible, which is taken as it is.
"""

DEFAULTS = {"mitr": 300, "grad_mitr": 300, "tol": 3e-6, "grad_tol": 3e-6}
"""What the solves of an implicit function are limited by unless they are told."""


class ImplicitFunction:
    r"""The function :math:`(A, B, u) \mapsto x` with :math:`x = \phi(Ax + Bu + b)`, for any ``A``.

    An own activation is a subclass that overrides :meth:`phi` (and :meth:`dphi`; without it the derivative comes from
    autograd; and :attr:`lipschitz`, if a bound on the slope is known). Settings belong to the instance: two functions
    never share any.

    Args:
        mitr: Most steps of the forward solve.
        grad_mitr: Most steps of a derivative's solve.
        tol: Absolute tolerance of the equilibrium, largest entry.
        grad_tol: Tolerance of a derivative's solve, relative to its source.
        activation: Name, :class:`~idl.activations.Activation` or callable; ``None`` means ReLU.
        constraint: Which ``A`` are allowed.
        solver: Method of the forward solve instead of :class:`~idl.solvers.Adaptive`; has its own ``mitr`` and ``tol``.
        adjoint: Rule of the gradient instead of :class:`~idl.differentiation.ImplicitAdjoint`; has its own limits.
        on_failure: What to do if a sample does not converge.

    Raises:
        TypeError, ValueError: If an argument is out of range, or a setting is given beside what has its own.

    Example:
        >>> class Sine(ImplicitFunction):
        ...     def phi(self, z):
        ...         return torch.sin(z)
        >>> Sine()(A=torch.tensor([[0.5]]), B=torch.ones(1, 1), u=torch.ones(1, 1))
        tensor([[0.9974]])
    """

    lipschitz: float | None = None
    """Largest slope of a :meth:`phi` that a subclass overrides; ``None`` if unknown: taken as 1, and nothing is proved.

    See :class:`~idl.Activation`; one that is given as ``activation`` brings its own.
    """

    def __init__(
        self,
        *,
        mitr: int = 300,
        grad_mitr: int = 300,
        tol: float = 3e-6,
        grad_tol: float = 3e-6,
        activation: str | Activation | Callable[[Tensor], Tensor] | None = None,
        constraint: AbstractConstraint | None = None,
        solver: AbstractFixedPointSolver | None = None,
        adjoint: AbstractAdjoint | None = None,
        on_failure: OnFailure = "warn",
    ) -> None:
        mitr, grad_mitr = checks.positive_integer("mitr", mitr), checks.positive_integer("grad_mitr", grad_mitr)
        tol, grad_tol = checks.non_negative("tol", tol), checks.non_negative("grad_tol", grad_tol)
        checks.one_of("on_failure", on_failure, ("raise", "warn", "ignore"))
        self.activation = self._own_activation(activation)
        constraint = Free() if constraint is None else constraint
        forward = Adaptive(tol, 0.0, mitr) if solver is None else solver
        backward = ImplicitAdjoint(Adaptive(0.0, grad_tol, grad_mitr)) if adjoint is None else adjoint
        self.constraint = checks.instance("constraint", constraint, AbstractConstraint, "Try InfNorm(kappa=0.99).")
        self.solver = checks.instance("solver", forward, AbstractFixedPointSolver, "Try Adaptive().")
        self.adjoint = checks.instance("adjoint", backward, AbstractAdjoint, "Try ImplicitAdjoint().")
        check_used("solver", solver, mitr=mitr, tol=tol)
        check_used("adjoint", adjoint, grad_mitr=grad_mitr, grad_tol=grad_tol)
        self.on_failure = on_failure

    def phi(self, z: Tensor) -> Tensor:
        """Return the activation of ``z``; override it for an own one."""
        return self.activation(z)

    def dphi(self, z: Tensor) -> Tensor:
        """Return the derivative of a componentwise activation at ``z``; override it together with :meth:`phi`."""
        return self.activation.slope(z)

    def state_matrix(self, A: StateParameters) -> StateMatrix:
        """Return the admissible state matrix of the free parameter ``A``, in its dtype."""
        admitted = self._admitted(A)
        dtype = _first(A).dtype
        return type(admitted)(*(tensor.to(dtype) for tensor in admitted.tensors))

    def __call__(
        self, A: StateParameters, B: Tensor, u: Tensor, *, bias: Tensor | None = None, x0: Tensor | None = None
    ) -> Tensor:
        """Return the equilibrium ``(*batch, n)`` of inputs ``(*batch, p)``, differentiable in ``A, B, u, bias``.

        Args:
            A: Free parameter of the state matrix.
            B: Input matrix, ``(n, p)``.
            u: Inputs.
            bias: Constant of the pre-activation, ``(n,)``.
            x0: Start of the iteration, zeros if ``None``; changes the steps, not the solution.

        Raises:
            TypeError, ValueError: If shapes, dtypes or devices disagree.
            ConvergenceError: If a sample did not converge and ``on_failure="raise"``.
        """
        return eagerly(self._attempt, A, B, u, bias, x0).x

    def solution(
        self, A: StateParameters, B: Tensor, u: Tensor, *, bias: Tensor | None = None, x0: Tensor | None = None
    ) -> Solution:
        """Return the equilibrium with its residual, steps, convergence and error bound.

        Args:
            A: See :meth:`__call__`, as for the others.
            B: Input matrix.
            u: Inputs.
            bias: Constant of the pre-activation.
            x0: Start of the iteration.
        """
        return eagerly(lambda: self._attempt(A, B, u, bias, x0).measured(self.contraction))

    @property
    def contraction(self) -> float | None:
        """A proved factor below 1 by which the map contracts in the max norm; ``None`` if none is proved."""
        return None if self.activation.lipschitz is None else self.constraint.contraction

    def sequence(
        self,
        A: StateParameters,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        u: Tensor,
        h0: Tensor,
        timeline: Timeline,
        *,
        bias: Tensor | None = None,
        parallel_in_time: bool = False,
    ) -> Trajectory:
        r"""Return :math:`x_t = \phi(Ax_t + B[u_t; h_{t-1}] + b)`, :math:`h_t = Cx_t + D[u_t; h_{t-1}]` for all times.

        Args:
            A: Free parameter of the state matrix.
            B: Input matrix, ``(n, p + h)``.
            C: Output matrix, ``(h, n)``.
            D: Direct matrix, ``(h, p + h)``; ``None`` for zero.
            u: Inputs, one row a row of ``timeline``.
            h0: What the first times read, one row a sequence.
            timeline: Which rows belong to which time.
            bias: Constant of the pre-activation, ``(n,)``.
            parallel_in_time: Whether to solve all times together; see :class:`~idl.ImplicitRNN`.

        Raises:
            TypeError, ValueError: If dtypes or devices disagree.
            ConvergenceError: If a state did not converge and ``on_failure="raise"``.
        """
        check_tensors(_first(A), B, u, bias, None)
        found = eagerly(
            lambda: solve_sequence(
                self._admitted(A),
                *(B, C, D, u, h0, timeline, bias),
                *(self.activation, self.solver, self.adjoint, self.on_failure, parallel_in_time),
            )
        )
        return found._replace(dtype=torch.promote_types(_first(A).dtype, u.dtype))

    def __repr__(self) -> str:
        parts = (self.activation, self.constraint, self.solver, self.adjoint)
        return f"{type(self).__name__}({', '.join(map(repr, parts))})"

    def _attempt(self, A: StateParameters, B: Tensor, u: Tensor, bias: Tensor | None, x0: Tensor | None) -> Attempt:
        # Before the constraint, which would fail on them with less to say.
        first = _first(A)
        check_tensors(first, B, u, bias, x0)
        methods = self.solver, self.adjoint, self.on_failure
        found = attempt(self._admitted(A), B, u, bias, self.activation, x0, *methods, self.contraction)
        dtype = torch.promote_types(first.dtype, u.dtype)
        return found if found.x.dtype == dtype else found._replace(x=found.x.to(dtype))

    def _admitted(self, A: StateParameters) -> StateMatrix:
        """Return the admissible state matrix, in float32 for half precision, which holds a bound to two digits only."""
        lipschitz = 1.0 if self.activation.lipschitz is None else self.activation.lipschitz
        if isinstance(A, StateMatrix):
            return A
        if not isinstance(A, tuple):
            return self.constraint.admit(_widened(checks.square_matrix("A", A)), lipschitz)
        if len(A) != 2:
            raise ValueError(f"`A` must be a matrix or a pair of factors (L, R); got {len(A)} tensors.")
        left, right = (checks.floating_tensor("A", factor) for factor in A)
        if left.dim() != 2 or left.shape != right.shape:
            shapes = f"{tuple(left.shape)} and {tuple(right.shape)}"
            raise ValueError(f"`A` as factors (L, R) of L R^T must have two of the same shape (n, r); got {shapes}.")
        return self.constraint.admit_factors(_widened(left), _widened(right), lipschitz)

    def _own_activation(self, activation: str | Activation | Callable[[Tensor], Tensor] | None) -> Activation:
        overridden = type(self).phi is not ImplicitFunction.phi
        if not overridden:
            return activations.resolve(activations.relu if activation is None else activation)
        if activation is not None:
            raise ValueError(
                f"`activation` must be None because {type(self).__name__} overrides phi; got {activation!r}."
            )
        derivative = self.dphi if type(self).dphi is not ImplicitFunction.dphi else None
        return Activation(self.phi, derivative, self.lipschitz, name=f"{type(self).__name__}.phi")


def check_used(name: str, given: object, **settings: object) -> None:
    """Check that no setting is changed beside an object that has its own."""
    changed = ", ".join(f"`{setting}`" for setting, value in settings.items() if value != DEFAULTS[setting])
    if given is not None and changed:
        raise ValueError(f"{changed} must not be given beside {name}={given!r}, which has its own; give it to that.")


def _first(A: StateParameters) -> Tensor:
    if isinstance(A, StateMatrix):
        return A.tensors[0]
    return A[0] if isinstance(A, tuple) and A else A


def _widened(A: Tensor) -> Tensor:
    return A if A.dtype in (torch.float32, torch.float64) else A.float()


class ImplicitFunctionInf(ImplicitFunction):
    r"""The implicit function with :math:`\|A\|_\infty \le \kappa < 1`: one equilibrium, for all weights.

    Args:
        kappa: Bound on the largest row sum of ``|A|``, in (0, 1).
        mitr, grad_mitr, tol, grad_tol, activation, solver, adjoint, on_failure: See :class:`ImplicitFunction`.

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> f = ImplicitFunctionInf(kappa=0.5)
        >>> f(A=torch.tensor([[7.0]]), B=torch.ones(1, 1), u=torch.ones(1, 1))  # as with A = .5
        tensor([[2.0000]])
    """

    def __init__(
        self,
        *,
        kappa: float = 0.99,
        mitr: int = 300,
        grad_mitr: int = 300,
        tol: float = 3e-6,
        grad_tol: float = 3e-6,
        activation: str | Activation | Callable[[Tensor], Tensor] | None = None,
        solver: AbstractFixedPointSolver | None = None,
        adjoint: AbstractAdjoint | None = None,
        on_failure: OnFailure = "warn",
    ) -> None:
        super().__init__(
            mitr=mitr,
            grad_mitr=grad_mitr,
            tol=tol,
            grad_tol=grad_tol,
            activation=activation,
            constraint=InfNorm(kappa),
            solver=solver,
            adjoint=adjoint,
            on_failure=on_failure,
        )


class ImplicitFunctionTriu(ImplicitFunction):
    """The implicit function with a strictly upper triangular ``A``: a feed-forward network, solved exactly.

    Forward and backward are substitutions, without tolerance; a callable activation must be componentwise.

    Args:
        activation: See :class:`ImplicitFunction`.

    Raises:
        TypeError, ValueError: If ``activation`` is unknown.

    Example:
        >>> from idl import ImplicitModel
        >>> model = ImplicitModel(100, 64, 10, f=ImplicitFunctionTriu)
        >>> bool(model.state_matrix().tril().any())
        False
    """

    def __init__(self, *, activation: str | Activation | Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__(
            activation=activation,
            constraint=StrictlyTriangular(),
            solver=BackSubstitution(),
            adjoint=ImplicitAdjoint(BackSubstitution()),
        )
        if self.activation.derivative is None:
            self.activation = activations.componentwise(self.activation)


__all__ = ["ImplicitFunction", "ImplicitFunctionInf", "ImplicitFunctionTriu"]
