"""Where map, solver and adjoint meet: the equilibrium of an implicit model."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from idl import activations, checks
from idl.activations import Activation
from idl.differentiation.base import AbstractAdjoint, FailureReport, OnFailure, check_methods
from idl.differentiation.implicit import ImplicitAdjoint, without_autocast
from idl.linalg.operators import Dense, StateMatrix, StrictlyUpper, to_precise
from idl.linalg.sparse import linear
from idl.maps.affine import AffineMap
from idl.maps.base import Parameters, ParametricMap
from idl.maps.binding import pinned
from idl.maps.closure import captured_tensors, with_captured
from idl.maps.general import GeneralMap
from idl.solvers.adaptive import Adaptive
from idl.solvers.base import AbstractFixedPointSolver, Solution
from idl.solvers.newton import Newton
from idl.transforms import eagerly

_SOLVER = Adaptive()
_ADJOINT = ImplicitAdjoint()


def equilibrium(
    A: Float[Tensor, "n n"] | StateMatrix,
    B: Float[Tensor, "n p"],
    u: Float[Tensor, "*batch p"],
    *,
    bias: Float[Tensor, " n"] | None = None,
    phi: str | Activation | Callable[[Tensor], Tensor] = activations.relu,
    x0: Float[Tensor, "*batch n"] | None = None,
    solver: AbstractFixedPointSolver = _SOLVER,
    adjoint: AbstractAdjoint = _ADJOINT,
    on_failure: OnFailure = "warn",
) -> Solution:
    r"""Solve the equilibrium equation :math:`x = \phi(Ax + Bu + b)` for each input of a batch.

    The equation of the implicit model (El Ghaoui et al., Implicit Deep Learning, SIAM J. Math. Data Sci. 3(3), 2021),
    with samples as rows. A unique solution exists when :math:`\|A\|_\infty < 1` and ``phi`` is componentwise
    1-Lipschitz; that is not tested here, :mod:`idl.wellposed` gives such matrices.

    Inputs in half precision, or under autocast, are solved in float32; ``x`` comes back in the promoted dtype.

    Args:
        A: State matrix, a tensor or one of the operators of :mod:`idl.linalg.operators`.
        B: Input matrix.
        u: Inputs, one a row.
        bias: Constant added to every pre-activation.
        phi: Activation: a name, an :class:`~idl.activations.Activation`, or any callable on rows.
        x0: Start of the iteration, zeros if ``None``; changes the steps, not the solution; no gradient.
        solver: Method that finds the fixed point.
        adjoint: Rule that gives gradients to ``A``, ``B``, ``bias`` and ``u``.
        on_failure: What to do if some sample has not converged after ``solver.max_steps``.

    Returns:
        The solution, ``x`` of shape ``(*batch, n)``.

    Raises:
        TypeError, ValueError: If shapes, dtypes or devices of the arguments disagree, or an option is unknown.
        ConvergenceError: If a sample did not converge and ``on_failure="raise"``.

    Example:
        >>> A, B, u = torch.tensor([[0.5]]), torch.tensor([[1.0]]), torch.tensor([[1.0]])
        >>> equilibrium(A, B, u).x
        tensor([[2.0000]])
    """
    check_methods(solver, adjoint)
    check_tensors(A.tensors[0] if isinstance(A, StateMatrix) else checks.dense_tensor("A", A), B, u, bias, x0)
    return eagerly(
        lambda: attempt(A, B, u, bias, activations.resolve(phi, "phi"), x0, solver, adjoint, on_failure).measured()
    )


class Attempt(NamedTuple):
    """A solved equilibrium whose residual has not been measured."""

    x: Tensor
    """The equilibrium, with its gradient; ``(*batch, n)``."""
    rows: Tensor
    """The same as ``(rows, n)`` in the precision of the solve."""
    steps: Tensor
    converged: Tensor
    parametric: ParametricMap
    parameters: Parameters
    inputs: tuple[Tensor, Tensor, Tensor | None]
    """``u``, ``B`` and bias, of which the first parameter was made."""

    def measured(self, kappa: float | None = None) -> Solution:
        """Return the solution; where the map contracts by ``kappa`` it says how far ``x`` is from the fixed point."""
        batch = self.x.shape[:-1]
        rows = self.x.to(self.rows.dtype).reshape(self.rows.shape)  # rounded, as it is returned
        parameters, affine = self.parameters, isinstance(self.parametric, AffineMap)
        if affine:  # rounding of B u moves the equilibrium too, and the bound must know of it
            with torch.no_grad(), without_autocast(rows.device):
                u, B, bias = self.inputs
                Z = linear(to_precise(u), to_precise(B), None if bias is None else to_precise(bias))
                parameters = (Z.reshape(rows.shape), *parameters[1:])
        residual = self.parametric.residual(parameters, rows)
        bound = None if kappa is None or not affine else (residual / (1 - kappa)).reshape(batch)
        return Solution(
            self.x, residual.reshape(batch), self.steps.reshape(batch), self.converged.reshape(batch), bound
        )


def attempt(
    A: Tensor | StateMatrix,
    B: Tensor,
    u: Tensor,
    bias: Tensor | None,
    phi: Activation,
    x0: Tensor | None,
    solver: AbstractFixedPointSolver,
    adjoint: AbstractAdjoint,
    on_failure: OnFailure,
    contraction: float | None = None,
) -> Attempt:
    """Solve as :func:`equilibrium` does, without the extra application of the map that measures the residual.

    Where the map is known to contract, ``contraction`` says by which factor.
    """
    state_matrix = A if isinstance(A, StateMatrix) else Dense(checks.square_matrix("A", A))
    _check_shapes(state_matrix, B, u, bias, x0)
    Z = linear(u, B, bias)
    dtype = torch.promote_types(Z.dtype, state_matrix.tensors[0].dtype)
    # Half precision cannot express a contraction's last digits: solve in float32 and round once, at the end.
    precision = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    rows = Z.to(precision)
    if rows.dim() != 2:  # each view is a node of autograd's
        rows = rows.reshape(-1, rows.shape[-1])
    tensors = [t.to(precision) for t in state_matrix.tensors]
    start = None if x0 is None else x0.to(precision).expand(Z.shape).reshape(rows.shape)
    parametric, rest = parametric_map(state_matrix, tensors, phi, rows.to(u.dtype), contraction)
    parameters = (rows, *rest)
    if isinstance(parametric, GeneralMap) and start is None:
        start = torch.zeros_like(rows)
    report = FailureReport(on_failure, lambda: advice(state_matrix, parametric, phi, solver))
    with without_autocast(Z.device):
        x, steps, converged = adjoint.fixed_point(parametric, solver, start, parameters, report)
    result = x.to(dtype)
    if Z.dim() != 2:
        result = result.reshape(Z.shape)
    return Attempt(result, x, steps, converged, parametric, parameters, (u, B, bias))


def parametric_map(
    state_matrix: StateMatrix, tensors: list[Tensor], phi: Activation, z: Tensor, contraction: float | None = None
) -> tuple[ParametricMap, Parameters]:
    """Return the map ``phi(x A^T + Z)``, and its parameters after ``Z``.

    Args:
        state_matrix: The state matrix.
        tensors: Its tensors, in the precision of the solve.
        phi: The activation.
        z: Pre-activations of some samples, in the dtype of the input, to see what ``phi`` reads.
        contraction: Factor by which the map is known to contract, if it is.
    """
    learned = [] if phi in activations.BY_NAME.values() else _learned(phi, z)
    kind, dtype = type(state_matrix), tensors[0].dtype
    if phi.derivative is not None and not any(tensor.requires_grad for tensor in learned):
        return AffineMap(kind, phi, contraction), tuple(tensors)
    # Autograd has to see all of phi: its derivative, or what it has learned.
    nilpotent = state_matrix.dim if isinstance(state_matrix, StrictlyUpper) else None
    learned_in_precision = (t.to(dtype) if t.is_floating_point() else t for t in learned)
    return GeneralMap(_composed(kind, phi, len(tensors), learned), nilpotent), (*tensors, *learned_in_precision)


def _learned(phi: Activation, z: Tensor) -> list[Tensor]:
    """Return the tensors that an activation reads, after a look at what it returns."""
    learned, image = captured_tensors(phi, (z,))
    _check_image("activation", image, z)
    if phi.derivative is not None:
        with torch.no_grad():
            two = z[:2]  # rows show whether they are reduced or broadcast, and cost nothing
            _check_image("derivative", phi.derivative(two), two)
    return learned


def _check_image(name: str, image: object, z: Tensor) -> None:
    """Check what a function of ``z`` has returned, componentwise or not."""
    # Half precision is solved in float32, and parameters of an activation may be in that already.
    exact = z.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(z.device.type)
    fits = isinstance(image, Tensor) and image.shape == z.shape and image.is_floating_point()
    if not isinstance(image, Tensor) or not fits or (exact and image.dtype != z.dtype):
        got = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
        raise ValueError(
            f"`{name}` must return a tensor of the shape and dtype of its argument, {z.dtype} {tuple(z.shape)}; "
            f"got {got}."
        )


def _composed(kind: type[StateMatrix], phi: Activation, count: int, captured: list[Tensor]) -> Callable[..., Tensor]:
    """Return ``phi(x A^T + Z)`` as a function of ``x, Z, *A, *captured``."""
    as_it_is = pinned(phi, captured)

    def function(x: Tensor, Z: Tensor, *values: Tensor) -> Tensor:
        image: Tensor = with_captured(as_it_is, captured, values[count:])(kind(*values[:count]).apply(x) + Z)
        return image

    return function


def check_tensors(A: object, B: object, u: object, bias: object, x0: object) -> None:
    """Check that all that is there is a tensor of floating-point numbers, on one device and of one dtype.

    Matrices may be in compressed rows, what there is one of for each sample may not.
    """
    tensors = {name: checks.floating_tensor(name, value) for name, value in (("A", A), ("B", B))}
    tensors["u"] = checks.dense_tensor("u", u)
    tensors |= {
        name: checks.dense_tensor(name, value) for name, value in (("bias", bias), ("x0", x0)) if value is not None
    }
    checks.same_device_and_dtype(tensors)


def _check_shapes(state_matrix: StateMatrix, B: Tensor, u: Tensor, bias: Tensor | None, x0: Tensor | None) -> None:
    n = state_matrix.dim
    if B.dim() != 2 or B.shape[0] != n:
        raise ValueError(f"`B` must have shape ({n}, p) because A is {n} x {n}; got {tuple(B.shape)}.")
    if u.dim() == 0 or u.shape[-1] != B.shape[1]:
        raise ValueError(
            f"`u` must have shape (..., {B.shape[1]}) because B has shape {tuple(B.shape)}; got {tuple(u.shape)}.\n"
            "    Flatten each sample first: u.flatten(1)."
        )
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"`bias` must have shape ({n},); got {tuple(bias.shape)}.")
    if x0 is not None and not _broadcasts(x0.shape, (*u.shape[:-1], n)):
        raise ValueError(f"`x0` must have shape {(*u.shape[:-1], n)}, one start a sample; got {tuple(x0.shape)}.")


def _broadcasts(shape: torch.Size, target: tuple[int, ...]) -> bool:
    """Return whether a start of this shape gives one to each sample: its last size is that of the state."""
    if len(shape) == 0 or shape[-1] != target[-1] or len(shape) > len(target):
        return False
    return all(size in (1, wanted) for size, wanted in zip(reversed(shape), reversed(target), strict=False))


def advice(
    state_matrix: StateMatrix, parametric: ParametricMap, phi: Activation, solver: AbstractFixedPointSolver
) -> str:
    """Return what is known of why a solve with this matrix did not converge, and what to try."""
    norm = float(state_matrix.detached().inf_norm())
    if phi.lipschitz is not None and norm * phi.lipschitz < 1:
        contracts = "so the map contracts, but slowly"
    elif norm < 1:
        contracts = "but the activation may be steeper than 1, so the map need not contract"
    else:
        contracts = "so the map need not contract"
    constrain = "Lower kappa" if norm < 1 else "Constrain A with ImplicitFunctionInf (||A||_inf <= kappa < 1)"
    tried_newton = isinstance(solver, Newton) or (isinstance(solver, Adaptive) and isinstance(parametric, AffineMap))
    another = "" if tried_newton else ", or try solver=Newton()"
    return (
        f"max row sum of |A| is {norm:.4g}, {contracts}. {constrain}, or raise mitr (the solver's max_steps){another}."
    )
