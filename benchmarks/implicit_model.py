"""Measure ImplicitModel beside torchidl, torchdeq, an explicit MLP and the bare matrix products.

    make bench                                 # all of it, about six minutes
    make bench ARGS="--smoke"                  # every section at toy size, in seconds
    make bench ARGS="--threads 1 --out runs/mine"

Writes implicit_model.json, .md and .png to the folder of --out. Nothing here passes or fails.
"""

import argparse
import functools
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: the profiler would report its start

import contestants
import instances
import report
import torch
from contestants import Solve
from measuring import Times, Turns, environment, graph_bytes, peak_bytes, timed_by_turns
from torch import Tensor

from idl import ImplicitAdjoint, ImplicitFunctionInf, ImplicitModel, Picard, UnrolledAdjoint


@dataclass(frozen=True)
class HardMatrix:
    """A state matrix whose equilibrium plain iteration does not reach in 300 steps, or only just."""

    name: str
    entries: Callable[[int], Tensor]
    scaled: Callable[[Tensor], Tensor]
    constrained: bool = True  # whether some kappa < 1 admits it


HARD_MATRICES = (
    HardMatrix("positive, rows .99", instances.positive, instances.with_row_sums(0.99)),
    HardMatrix("positive, rows .999", instances.positive, instances.with_row_sums(0.999)),
    HardMatrix("5 blocks, rows .99", instances.blocks, instances.with_row_sums(0.99)),
    HardMatrix("5 blocks, rows .999", instances.blocks, instances.with_row_sums(0.999)),
    HardMatrix("mixed signs, radius .98", instances.mixed_signs, instances.with_radius(0.98)),
    HardMatrix("random signs, radius .98", instances.random_signs, instances.with_radius(0.98), constrained=False),
)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is measured."""

    threads: tuple[int, ...] = (1, 2)
    seed: int = 0
    outputs: int = 10
    solve: Solve = field(default_factory=Solve)
    # Training steps: (input, hidden, batch), each with A of row sums .8 and with six times that, clipped at .99.
    training_sizes: tuple[tuple[int, int, int], ...] = (
        (784, 100, 128),
        (3072, 300, 64),
        (784, 1000, 128),
        (96, 160, 256),
    )
    row_sum: float = 0.8
    scales: tuple[float, ...] = (1.0, 6.0)
    training_turns: Turns = field(default_factory=lambda: Turns(seconds=5, fewest=12, most=150, warm=1, timed=3))
    # Hard equilibria, forward only; kappa is above the row sums, so that the constraint does nothing.
    hard_hidden: tuple[int, ...] = (100, 400)
    hard_inputs: int = 784
    hard_batch: int = 128
    hard_solve: Solve = field(default_factory=lambda: Solve(kappa=0.9999))
    hard_turns: Turns = field(default_factory=lambda: Turns(seconds=3, fewest=5, most=40, warm=0, timed=1))
    # Low rank: (input, hidden, rank, batch), factors with row sums that no constraint changes.
    low_rank_size: tuple[int, int, int, int] = (32, 2000, 4, 128)
    low_rank_row_sum: float = 0.9
    low_rank_turns: Turns = field(default_factory=lambda: Turns(seconds=8, fewest=8, most=60, warm=0, timed=1))
    # Memory: (input, hidden, batch) with positive A of row sums .999, so that no step count is cut short.
    memory_size: tuple[int, int, int] = (784, 100, 128)
    memory_row_sum: float = 0.999
    memory_steps: tuple[int, ...] = (10, 30, 100, 300)

    def smoke(self) -> "Settings":
        """Return the same at toy size."""
        once = Turns(seconds=0, fewest=2, most=2, warm=0, timed=1)
        return replace(
            self,
            training_sizes=((784, 100, 128), (24, 40, 16)),
            training_turns=once,
            hard_hidden=(50,),
            hard_batch=16,
            hard_solve=Solve(max_steps=50, kappa=0.9999),
            hard_turns=once,
            low_rank_size=(32, 200, 4, 128),
            low_rank_turns=once,
        )


@dataclass
class Results:
    """The figures of each section, a dictionary a row; what is written as JSON."""

    training: list[dict[str, Any]] = field(default_factory=list)
    hard: list[dict[str, Any]] = field(default_factory=list)
    low_rank: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)


def measure_training(settings: Settings, size: tuple[int, int, int], scale: float) -> dict[str, Any]:
    """Time zero_grad, forward, loss and backward of all models, and the bare products of ours."""
    inputs, hidden, batch = size
    torch.manual_seed(settings.seed)
    matrices = instances.random_model(hidden, inputs, settings.outputs, settings.row_sum)
    matrices["A"] *= scale
    u, labels = instances.random_batch(inputs, batch, settings.outputs)

    models = contestants.training_models(matrices, settings.solve)
    steps = {name: contestants.training_step(model, u, labels) for name, model in models.items()}
    products = contestants.recorded_products(matrices, u, labels, settings.solve)
    admissible = {**matrices, "A": models["ours"].state_matrix().detach()}
    steps["bare"] = contestants.bare_step(admissible, u, products)
    times = timed_by_turns(steps, settings.training_turns)

    with torch.no_grad():
        y, solution = models["ours"](u, return_solution=True)
        disagreement = {
            name: instances.relative_error(models[name](u), y.double()) for name in ("torchidl", "torchdeq")
        }
    return {
        "size": {"input": inputs, "hidden": hidden, "batch": batch},
        "row_sum": min(settings.row_sum * scale, settings.solve.kappa),
        "milliseconds": times.json(),
        "ratios": ratios(times, ("torchidl", "ours"), ("torchdeq", "ours"), ("ours", "MLP"), ("ours", "bare")),
        "forward_steps": int(solution.steps.max()),
        "backward_steps": 1 + len(products.backward),
        "rows_of_forward_products": products.forward,
        "rows_of_backward_products": products.backward,
        "methods": products.methods,
        "residual": float(solution.residual.max()),
        "output_relative_to_ours": disagreement,
    }


@dataclass(frozen=True)
class HardProblem:
    """A hard equilibrium and its solution."""

    A: Tensor
    B: Tensor
    u: Tensor
    truth: Tensor
    truth_residual: float


@functools.cache  # the truth takes longer than the measurements, and is the same for all thread counts
def hard_problem(settings: Settings, kind: HardMatrix, hidden: int) -> HardProblem:
    """Return the problem of a matrix."""
    torch.manual_seed(settings.seed)
    A = kind.scaled(kind.entries(hidden))
    B = torch.randn(hidden, settings.hard_inputs) / settings.hard_inputs**0.5
    B *= B.sum().sign()  # were u B^T negative on the whole, most units would be off and the equilibrium easy
    u, _ = instances.random_batch(settings.hard_inputs, settings.hard_batch, settings.outputs)
    return HardProblem(A, B, u, *instances.exact_state(A, B, u))


def measure_hard(settings: Settings, kind: HardMatrix, hidden: int) -> dict[str, Any]:
    """Time the search for hard equilibria, and compare what is found with the truth."""
    problem = hard_problem(settings, kind, hidden)
    A, B, u, truth = problem.A, problem.B, problem.u, problem.truth
    solvers = contestants.state_solvers(A, B, u, settings.hard_solve, constrained=kind.constrained)
    with torch.no_grad():
        states = {name: solver() for name, solver in solvers.items()}
        times = timed_by_turns(solvers, settings.hard_turns)
        solution = contestants.our_function(settings.hard_solve, kind.constrained).solution(A, B, u)
    return {
        "matrix": kind.name,
        "hidden": hidden,
        "largest_row_sum": float(A.abs().sum(1).max()),
        "relative_error": {name: instances.relative_error(x, truth) for name, x in states.items()},
        "milliseconds": times.json(),
        "ratios": ratios(times, ("torchidl", "ours")),
        "steps": int(solution.steps.max()),
        "converged": float(solution.converged.double().mean()),
        "residual": float(solution.residual.max()),
        "truth_residual": problem.truth_residual,
    }


def measure_low_rank(settings: Settings) -> dict[str, Any]:
    """Time training steps with ``A = L R^T``."""
    inputs, hidden, rank, batch = settings.low_rank_size
    torch.manual_seed(settings.seed)
    matrices = instances.random_low_rank_model(hidden, inputs, settings.outputs, rank, settings.low_rank_row_sum)
    u, labels = instances.random_batch(inputs, batch, settings.outputs)
    models = contestants.low_rank_models(matrices, settings.solve)
    steps = {name: contestants.training_step(model, u, labels) for name, model in models.items()}
    times = timed_by_turns(steps, settings.low_rank_turns)
    with torch.no_grad():
        disagreement = instances.relative_error(models["torchidl"](u), models["ours"](u).double())
    return {
        "size": {"input": inputs, "hidden": hidden, "rank": rank, "batch": batch},
        "milliseconds": times.json(),
        "ratios": ratios(times, ("torchidl", "ours")),
        "output_relative_to_ours": {"torchidl": disagreement},
    }


def measure_memory(settings: Settings, steps: int) -> dict[str, Any]:
    """Count the bytes that a training step of ``steps`` iterations keeps and needs, with both adjoints."""
    inputs, hidden, batch = settings.memory_size
    torch.manual_seed(settings.seed)
    matrices = instances.random_model(hidden, inputs, settings.outputs, settings.row_sum)
    matrices["A"] = instances.scaled_rows(instances.positive(hidden), settings.memory_row_sum)
    u, labels = instances.random_batch(inputs, batch, settings.outputs)
    exhausting = Picard(atol=0.0, rtol=0.0, max_steps=steps)
    adjoints = {"implicit": ImplicitAdjoint(exhausting), "unrolled": UnrolledAdjoint(steps)}
    row: dict[str, Any] = {"iterations": steps}
    for name, adjoint in adjoints.items():
        f = ImplicitFunctionInf(kappa=0.9999, solver=exhausting, adjoint=adjoint, on_failure="ignore")
        model = contestants.set_parameters(ImplicitModel(hidden, inputs, settings.outputs, f=f), matrices)
        step = contestants.training_step(model, u, labels)
        step()  # the first one may set up what the others find
        model.zero_grad()
        with torch.no_grad():
            _, solution = model(u, return_solution=True)
        row[name] = {
            "graph_bytes": graph_bytes(model, u),
            "peak_bytes": peak_bytes(step),
            "steps_taken": int(solution.steps.max()),
        }
    return row


def ratios(times: Times, *pairs: tuple[str, str]) -> dict[str, dict[str, float]]:
    """Return median and quartiles of the ratio of each pair of contestants."""
    return {f"{one}/{other}": times.ratio(one, other).json() for one, other in pairs}


def run(settings: Settings) -> Results:
    """Measure everything; the rows of the timed sections say how many threads they were measured with."""
    results = Results()

    def note(rows: list[dict[str, Any]], section: str, row: dict[str, Any], threads: int) -> None:
        rows.append({"threads": threads, **row})
        print(f"  {section} {len(rows)} done", flush=True)

    for threads in settings.threads:
        torch.set_num_threads(threads)
        print(f"{threads} thread(s):", flush=True)
        for size in settings.training_sizes:
            for scale in settings.scales:
                note(results.training, "training", measure_training(settings, size, scale), threads)
        for hidden in settings.hard_hidden:
            for kind in HARD_MATRICES:
                note(results.hard, "hard", measure_hard(settings, kind, hidden), threads)
        note(results.low_rank, "low rank", measure_low_rank(settings), threads)
    for steps in settings.memory_steps:  # does not depend on the threads
        note(results.memory, "memory", measure_memory(settings, steps), settings.threads[-1])
    return results


def parsed_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="toy sizes, files named implicit_model_smoke.*")
    parser.add_argument("--threads", type=int, nargs="+", default=list(Settings.threads), metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="FOLDER")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, write the three files, print the tables."""
    options = parsed_arguments()
    settings = replace(Settings(), threads=tuple(options.threads))
    settings = settings.smoke() if options.smoke else settings
    warnings.simplefilter("ignore")  # of the solves that do not converge: their errors are in the tables
    results = asdict(run(settings))
    described = environment(("torch", "numpy", "implicit-deep-learning", "torchidl", "torchdeq"))
    text = report.markdown(results, described)

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("implicit_model_smoke" if options.smoke else "implicit_model")
    content = {"environment": described, "settings": asdict(settings), **results}
    path.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    path.with_suffix(".md").write_text(text)
    report.draw(results, path.with_suffix(".png"))
    print(f"\n{text}\nWritten: {path}.json, .md, .png")


if __name__ == "__main__":
    main()
