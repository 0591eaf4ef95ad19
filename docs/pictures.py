"""Draw the pictures of these pages that show what the equations say: no timing, seconds on any machine.

    python docs/pictures.py

They are written beside the others, to docs/images.
"""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from idl import (
    Adaptive,
    Anderson,
    ImplicitAdjoint,
    Newton,
    PhantomAdjoint,
    Picard,
    UnrolledAdjoint,
    equilibrium,
)
from idl.atomic import write_bytes
from idl.differentiation import AbstractAdjoint
from idl.solvers import AbstractFixedPointSolver

IMAGES = Path(__file__).parent / "images"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # of Okabe and Ito, as in idl.training
STEPS = 60


def main() -> None:
    """Draw all of them."""
    contraction(IMAGES / "contraction.png")
    memory(IMAGES / "memory.png")
    solvers(IMAGES / "solvers.png")


def problem(kappa: float, n: int = 100, batch: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Return positive ``A`` with all row sums at ``kappa``, the slowest there is, and ``B`` and ``u`` in float64."""
    generator = torch.Generator().manual_seed(0)
    A = torch.rand(n, n, generator=generator, dtype=torch.float64)
    B, u = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n, 8), (batch, 8)))
    return kappa * A / A.sum(1, keepdim=True), B, u


def contraction(path: Path) -> None:
    """Draw one unit whose steps close in on the crossing, and the error of a hundred units below its proved rate."""
    figure, (left, right) = panels()
    a, b = -0.8, 1.5
    z = torch.linspace(0, 1.6, 200)
    left.plot(z, torch.tanh(a * z + b), color=COLOURS[0], label=r"$\phi(ax + bu)$")
    left.plot(z, z, color="#555555", linewidth=1.0, label=r"$x$")
    x, corners = 0.1, [(0.1, 0.0)]
    for _ in range(8):
        image = float(torch.tanh(torch.tensor(a * x + b)))
        corners += [(x, image), (image, image)]
        x = image
    left.plot(*zip(*corners, strict=True), color=COLOURS[1], linewidth=1.2, label="the iteration")
    left.set(xlabel="$x$", xlim=(0, 1.6), ylim=(0, 1.15), title=r"One unit: $a = -0.8$, $bu = 1.5$, $\tanh$")
    left.legend(loc="lower right", frameon=False)

    for colour, kappa in zip(COLOURS, (0.5, 0.8, 0.95), strict=False):
        A, B, u = problem(kappa)
        right.plot(errors(A, B, u), color=colour, label=rf"$\kappa$ = {kappa}")
        first = float(torch.relu(u @ B.T).abs().max())  # the size of the first step
        bound = [first * kappa**step / (1 - kappa) for step in range(STEPS)]
        right.plot(bound, color=colour, linewidth=1.2, linestyle="--")
    signs = torch.randn(A.shape, generator=torch.Generator().manual_seed(0), dtype=A.dtype).sign()
    label = rf"$\kappa$ = {kappa}, signs drawn"
    right.plot(errors(signs * A, B, u), color=colour, linewidth=1.2, linestyle=":", label=label)
    right.set(xlabel="step", yscale="log", ylim=(1e-9, 1e6), title="100 units: largest error, and its proved bound")
    right.set_ylabel(r"$|x_t - x^*|_\infty$")
    right.legend(loc="upper right", frameon=False)
    save(figure, path)


def errors(A: Tensor, B: Tensor, u: Tensor) -> list[float]:
    """Return the largest error before each of the first steps of plain iteration with ReLU."""
    exact, x, found = reference(A, B, u), u.new_zeros(len(u), len(A)), []
    for _ in range(STEPS):
        found.append(float((x - exact).abs().max()))
        x = torch.relu(x @ A.T + u @ B.T)
    return found


def reference(A: Tensor, B: Tensor, u: Tensor) -> Tensor:
    """Return the equilibria with ReLU, solved as dense systems on the units that are active."""
    x = equilibrium(A, B, u, solver=Newton(atol=1e-12)).x
    active = (x @ A.T + u @ B.T > 0).to(A.dtype)
    return torch.linalg.solve(torch.eye(len(A)).to(A) - active[:, :, None] * A, active * (u @ B.T))


def memory(path: Path) -> None:
    """Draw what the adjoints keep for the backward, in bytes that autograd saves, and how exact the gradients are."""
    figure, (left, right) = panels()
    counts, A, B, u = (5, 10, 20, 40, 80), *problem(0.9)
    A.requires_grad_()

    def forward(adjoint: AbstractAdjoint, steps: int) -> Tensor:
        x: Tensor = equilibrium(A, B, u, adjoint=adjoint, solver=Picard(0.0, 0.0, steps), on_failure="ignore").x
        return x

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(x.square().sum(), A)[0]

    adjoints: dict[str, Callable[[int], AbstractAdjoint]] = {
        "recorded": UnrolledAdjoint,
        "the last 5 recorded": lambda _: PhantomAdjoint(steps=5),
        "implicit": lambda _: ImplicitAdjoint(),
    }
    exact = gradient(reference(A, B, u))
    for colour, (name, make) in zip(COLOURS, adjoints.items(), strict=False):
        sizes = [saved(partial(forward, make(steps), steps)) / 2**20 for steps in counts]
        left.plot(counts, sizes, color=colour, marker="o", markersize=4, label=name)
        misses = [float((gradient(forward(make(steps), steps)) - exact).norm() / exact.norm()) for steps in counts]
        right.plot(counts, misses, color=colour, marker="o", markersize=4)
    left.set(xlabel="steps of the forward", ylabel="kept for the backward (MiB)", ylim=(0, None), title="Memory")
    left.legend(loc="upper left", frameon=False)
    right.set(xlabel="steps of the forward", yscale="log", ylabel="relative error", title="Gradient of A")
    save(figure, path)


def solvers(path: Path) -> None:
    """Draw the error of each solver against the applications it spent, where plain iteration is fast and slow."""
    figure, parts = panels()
    methods: dict[str, Callable[[int], AbstractFixedPointSolver]] = {
        "Picard": lambda budget: Picard(0.0, 0.0, budget),
        "Anderson": lambda budget: Anderson(0.0, 0.0, budget),
        "Newton": lambda budget: Newton(0.0, 0.0, budget),
        "Adaptive": lambda budget: Adaptive(0.0, 0.0, budget),
    }
    for axes, kappa in zip(parts, (0.9, 0.999), strict=True):
        A, B, u = problem(kappa)
        exact = reference(A, B, u)
        for colour, (name, method) in zip(COLOURS, methods.items(), strict=True):
            budgets = range(1, 121, 3)
            found = [equilibrium(A, B, u, solver=method(budget), on_failure="ignore") for budget in budgets]
            spent = [float(solution.steps.double().mean()) for solution in found]
            errors = [float((solution.x - exact).abs().max() / exact.abs().max()) for solution in found]
            axes.plot(spent, errors, color=colour, label=name)
        axes.set(xlabel="applications of the map", yscale="log", ylim=(1e-12, 2), title=rf"row sums of {kappa}")
    parts[0].set_ylabel("relative error")
    parts[1].legend(loc="upper right", frameon=False)
    save(figure, path)


def saved(forward: Callable[[], Tensor]) -> int:
    """Return the bytes that autograd keeps after a forward, each storage once."""
    sizes: dict[int, int] = {}
    tensors = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        tensors.append(tensor)  # so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(sizes.values())


def panels() -> tuple[Figure, tuple[Axes, Axes]]:
    """Return a figure of two panels in the form of the other pictures."""
    figure = Figure(figsize=(9.0, 3.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    return figure, (left, right)


def save(figure: Figure, path: Path) -> None:
    """Write the picture whole or not at all."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_bytes(path, content.getvalue())


if __name__ == "__main__":
    main()
