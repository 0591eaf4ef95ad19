"""What is measured beside what: this library, two public ones, the explicit MLP and the bare matrix products.

Every model has the parameters ``A, B, C, D`` and maps ``u`` to ``y = C x + D u`` with ``x = relu(A x + B u)``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torchidl
from torch import Tensor, nn
from torch.nn import functional as F
from torchdeq import get_deq
from torchidl.implicit_function import ImplicitFunction as TorchidlFunction
from torchidl.implicit_function import ImplicitFunctionInf as TorchidlFunctionInf

from idl import Adaptive, ImplicitAdjoint, ImplicitFunction, ImplicitFunctionInf, ImplicitModel
from idl.training import ExplicitMLP


@dataclass(frozen=True)
class Solve:
    """How far each library is asked to solve; the defaults of ours and of torchidl."""

    max_steps: int = 300
    tolerance: float = 3e-6
    kappa: float = 0.99


def set_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """Copy ``values`` into the parameters of these names; return the model."""
    with torch.no_grad():
        for name, value in values.items():
            getattr(model, name).copy_(value)
    return model


def training_models(matrices: Mapping[str, Tensor], solve: Solve) -> dict[str, nn.Module]:
    """Return the models with these matrices, by name."""
    (hidden, inputs), outputs = matrices["B"].shape, len(matrices["C"])
    models = {
        "ours": ImplicitModel(hidden, inputs, outputs, **_settings(solve)),
        "torchidl": torchidl.ImplicitModel(inputs, outputs, hidden, **_settings(solve)),
        "torchdeq": TorchdeqModel(hidden, inputs, outputs, solve),
        "MLP": ExplicitMLP(inputs, hidden, outputs),
    }
    return {name: set_parameters(model, matrices) for name, model in models.items()}


def low_rank_models(matrices: Mapping[str, Tensor], solve: Solve) -> dict[str, nn.Module]:
    """Return the two models that know ``A = L R^T``, by name."""
    (hidden, inputs), outputs, rank = matrices["B"].shape, len(matrices["C"]), matrices["L"].shape[1]
    models = {
        "ours": ImplicitModel(hidden, inputs, outputs, low_rank=True, rank=rank, **_settings(solve)),
        "torchidl": torchidl.ImplicitModel(inputs, outputs, hidden, is_low_rank=True, rank=rank, **_settings(solve)),
    }
    return {name: set_parameters(model, matrices) for name, model in models.items()}


def training_step(model: nn.Module, u: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return zero_grad, forward, cross entropy and backward as one call; the parameters stay as they are."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        optimiser.zero_grad()
        F.cross_entropy(model(u), labels).backward()

    return step


def state_solvers(
    A: Tensor, B: Tensor, u: Tensor, solve: Solve, *, constrained: bool
) -> dict[str, Callable[[], Tensor]]:
    """Return calls that find the equilibrium ``(batch, n)`` and record no gradient, by name.

    Args:
        A: State matrix.
        B: Input matrix.
        u: Inputs.
        solve: Settings; ``kappa`` must be above the row sums of ``A``, so that no constraint changes it.
        constrained: Whether to use the functions with the constraint, or those without, for an ``A`` that none admits.
    """
    ours = our_function(solve, constrained)
    theirs = TorchidlFunctionInf if constrained else TorchidlFunction
    theirs.set_parameters(**_settings(solve))  # of the class: holds for all that use it from here on
    return {
        "ours": lambda: ours(A, B, u),
        "torchidl": lambda: theirs.apply(A, B, A.new_zeros(len(A), len(u)), u.T).T,
        "deq picard": _torchdeq_state("fixed_point_iter", A, B, u, solve),
        "deq anderson": _torchdeq_state("anderson", A, B, u, solve),
    }


def our_function(solve: Solve, constrained: bool) -> ImplicitFunction:
    """Return the implicit function of ours with its default solver, with the constraint or without."""
    settings = _settings(solve)
    kappa = settings.pop("kappa")
    return ImplicitFunctionInf(kappa=kappa, **settings) if constrained else ImplicitFunction(**settings)


class TorchdeqModel(nn.Module):
    """The implicit model as a user of torchdeq writes it, with exact gradients and the constraint of torchidl."""

    def __init__(self, hidden: int, inputs: int, outputs: int, solve: Solve) -> None:
        super().__init__()
        shapes = {"A": (hidden, hidden), "B": (hidden, inputs), "C": (outputs, hidden), "D": (outputs, inputs)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.kappa = solve.kappa
        self.deq = _deq("fixed_point_iter", solve)

    def forward(self, u: Tensor) -> Tensor:
        norm = torch.linalg.matrix_norm(self.A, ord=torch.inf)
        A = self.A * (self.kappa / norm) if norm > self.kappa else self.A
        return F.linear(_torchdeq_solution(self.deq, A, self.B, u), self.C) + F.linear(u, self.D)


@dataclass(frozen=True)
class Recording(Adaptive):
    """The default solver, noting the rows of each matrix product it makes and the methods it used."""

    rows: list[int] = field(default_factory=list, compare=False)
    methods: set[str] = field(default_factory=set, compare=False)

    def step(self, problem: Any, state: Any, budget: int) -> tuple[Any, int]:
        state, applications = super().step(problem, state, budget)
        self.rows.extend([len(state.x)] * applications)
        self.methods.add(type(state).__name__.removesuffix("State"))
        return state, applications


@dataclass(frozen=True)
class Products:
    """The matrix products of one training step of ours: how many rows each of them has."""

    forward: Sequence[int]
    backward: Sequence[int]
    methods: Sequence[str]


def recorded_products(matrices: Mapping[str, Tensor], u: Tensor, labels: Tensor, solve: Solve) -> Products:
    """Run one training step of ours and return what it multiplied; the start at zero costs no product."""
    forward = Recording(solve.tolerance, 0.0, solve.max_steps)
    backward = Recording(0.0, solve.tolerance, solve.max_steps)
    f = ImplicitFunctionInf(kappa=solve.kappa, solver=forward, adjoint=ImplicitAdjoint(backward))
    (hidden, inputs), outputs = matrices["B"].shape, len(matrices["C"])
    training_step(set_parameters(ImplicitModel(hidden, inputs, outputs, f=f), matrices), u, labels)()
    return Products(forward.rows, backward.rows, sorted(forward.methods | backward.methods))


def bare_step(matrices: Mapping[str, Tensor], u: Tensor, products: Products) -> Callable[[], None]:
    """Return the matrix products of a training step of ours, and nothing else, as one call.

    The iterations write into two buffers in turn; the other products return new tensors, as in training.
    """
    A, B, C, D = (matrices[name] for name in "ABCD")
    gradient = torch.full((len(u), len(C)), 1 / len(u))
    buffers = torch.empty(len(u), len(A)), torch.empty(len(u), len(A))

    def step() -> None:
        z = torch.mm(u, B.T)
        x = z
        for k, rows in enumerate(products.forward):
            torch.addmm(z[:rows], x[:rows], A.T, out=buffers[k % 2][:rows])
            x = buffers[k % 2]
        torch.mm(x, C.T)
        torch.mm(u, D.T)
        torch.mm(gradient.T, x)
        torch.mm(gradient.T, u)
        v = torch.mm(gradient, C)
        state = x.clone() if products.backward else x
        for k, rows in enumerate(products.backward):
            torch.mm(v[:rows], A, out=buffers[k % 2][:rows])
            v = buffers[k % 2]
        torch.mm(v.T, state)
        torch.mm(v.T, u)

    return torch.no_grad()(step)


def _settings(solve: Solve) -> dict[str, Any]:
    """Return the settings under the names that ours and torchidl share."""
    limits = {"mitr": solve.max_steps, "grad_mitr": solve.max_steps}
    return {**limits, "tol": solve.tolerance, "grad_tol": solve.tolerance, "kappa": solve.kappa}


def _deq(solver: str, solve: Solve) -> nn.Module:
    limits = {"f_max_iter": solve.max_steps, "b_max_iter": solve.max_steps}
    tolerances = {"f_tol": solve.tolerance, "b_tol": solve.tolerance}
    return get_deq(f_solver=solver, b_solver=solver, ift=True, **limits, **tolerances)


def _torchdeq_solution(deq: nn.Module, A: Tensor, B: Tensor, u: Tensor) -> Tensor:
    z = F.linear(u, B)
    states, _ = deq(lambda x: torch.relu(torch.addmm(z, x, A.T)), torch.zeros_like(z))
    return states[-1]


def _torchdeq_state(solver: str, A: Tensor, B: Tensor, u: Tensor, solve: Solve) -> Callable[[], Tensor]:
    deq = _deq(solver, solve).eval()

    def state() -> Tensor:
        try:
            return _torchdeq_solution(deq, A, B, u)
        except torch.linalg.LinAlgError:  # Anderson's small systems may be singular
            return u.new_full((len(u), len(A)), torch.nan)

    return state
