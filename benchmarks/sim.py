"""Measure SIM's row solver beside torchidl's, cvxpy and scikit-learn, from the states of a FashionMNIST teacher.

    make bench-sim                              # all of it, about ten minutes
    make bench-sim ARGS="--smoke"               # digits and few penalties, in seconds
    make bench-sim ARGS="--threads 1 --out runs/mine"

Writes sim.json, .md and .png to the folder of --out. Nothing here passes or fails.
"""

import argparse
import contextlib
import io
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from measuring import Turns, environment, peak_bytes, timed_by_turns
from sklearn.linear_model import Lasso
from torch import Tensor, nn
from torchidl.sim.solvers import ADMMSolver, LeastSquareSolver

from idl import SIM, ImplicitModel, data
from idl.nn import SparseImplicitModel
from idl.sim import rescaling
from idl.sim.capture import Teacher
from idl.sim.moments import Moments, accumulate
from idl.sim.problem import RowProblem
from idl.sim.solvers import CVX, AbstractRowSolver, CoordinateDescent, Hybrid


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is measured."""

    threads: tuple[int, ...] = (1, 2)
    seed: int = 0
    dataset: str = "fashion-mnist"
    hidden: tuple[int, ...] = (64, 32, 16)
    epochs: int = 6
    samples: tuple[int, ...] = (60_000, 2_000)
    lams: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-6)
    kappa: float = 0.99
    tol: float = 1e-4
    repeats: int = 3  # of our solver; medians
    # The peers, on the smaller number of samples and the rescaled teacher.
    peer_lam: float = 1e-3
    reference_rows: int = 8  # that cvxpy and scikit-learn solve; times are for all rows, extrapolated
    admm_steps: int = 50  # of the 1500 in torchidl's example; extrapolated
    example_steps: int = 1500
    # The forward of a sparse model: (hidden, inputs, outputs), part of the weights that is kept, samples.
    shapes: tuple[tuple[int, int, int], ...] = ((112, 784, 10), (256, 784, 10), (1000, 1000, 1000), (1024, 4096, 1024))
    densities: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    batches: tuple[int, ...] = (1, 32, 1024)
    turns: Turns = Turns(seconds=3, fewest=7, most=30, warm=1, timed=3)  # noqa: RUF009, it is immutable

    def smoke(self) -> "Settings":
        """Return the same at toy size."""
        return replace(
            self, dataset="digits", samples=(1000, 500), lams=(1e-2, 1e-3), epochs=10, repeats=1, admm_steps=5,
            reference_rows=2, shapes=((500, 500, 10),), densities=(0.05, 0.2), batches=(1, 32),
            turns=Turns(seconds=1, fewest=1, most=1, warm=1, timed=2),
        )  # fmt: skip


def trained_teacher(settings: Settings) -> tuple[nn.Module, Tensor, tuple[Tensor, Tensor]]:
    """Return a bias-free teacher, its training inputs, and test inputs with their labels."""
    dataset = data.load(settings.dataset, progress=False)
    inputs, labels = dataset.train_images.flatten(1), dataset.train_labels
    torch.manual_seed(settings.seed)
    sizes = (inputs.shape[1], *settings.hidden, len(dataset.classes))
    layers: list[nn.Module] = []
    for size, following in itertools.pairwise(sizes):
        layers += [nn.Linear(size, following, bias=False), nn.ReLU()]
    teacher = nn.Sequential(*layers[:-1])
    optimiser = torch.optim.Adam(teacher.parameters(), 1e-3)
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(inputs)).split(128):
            optimiser.zero_grad()
            nn.functional.cross_entropy(teacher(inputs[rows]), labels[rows]).backward()
            optimiser.step()
    return teacher, inputs, (dataset.test_images.flatten(1), dataset.test_labels)


def accuracy(model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    """Return the part of the labels that a model predicts."""
    with torch.no_grad():
        return float((model(test[0]).argmax(1) == test[1]).double().mean())


@dataclass(frozen=True)
class States:
    """Recorded states of a teacher on some samples, and their moments."""

    X: Tensor
    Z: Tensor
    U: Tensor
    moments: Moments
    seconds: float
    """From the states to their moments."""


def recorded_states(teacher: nn.Module, inputs: Tensor, *, rescaled: bool, kappa: float) -> States:
    """Record, rescale and accumulate."""
    watched = Teacher(teacher, inputs[:2])
    recording = watched.record(inputs)
    scale = torch.ones(recording.Z.shape[1])
    if rescaled:
        sizes = [layer.units for layer in watched.layers[::-1]]
        energies = recording.Z.double().square().mean(0)
        scale = rescaling.unit_variance(watched.matrices().A, sizes, energies, kappa).float()
    X, Z = recording.X * scale, recording.Z * scale
    S = torch.cat((X, recording.U), 1)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        moments = accumulate([(S, Z)])
        times.append(time.perf_counter() - start)
    return States(X, Z, recording.U, moments, statistics.median(times))


def row_problem(states: States, lam: float, kappa: float) -> RowProblem:
    """Return the rows of ``[A B]``."""
    m = states.moments
    penalty = torch.full((len(m.gram),), lam, dtype=torch.float64)
    return RowProblem(m.gram, m.cross, m.energies, penalty, states.X.shape[1], kappa)


def timed(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Return the median seconds of a call, and its last result."""
    times, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def measure_ours(settings: Settings, states: States, lam: float, solver: AbstractRowSolver) -> dict[str, Any]:
    """Time a solver of ours from the moments to the last certified row."""
    problem = row_problem(states, lam, settings.kappa)
    seconds, solution = timed(lambda: solver.solve(problem), settings.repeats)
    return {
        "solver": type(solver).__name__,
        "lam": lam,
        "seconds": seconds,
        "worst_gap": float(solution.gap.max()),
        "rows_open": int((solution.gap > settings.tol).sum()),
        "nonzeros": int(solution.W.count_nonzero()),
        "max_row_sum": float(solution.W[:, : problem.ball].abs().sum(1).max()),
        "objective": float(solution.objective.sum()),
    }


def measure_peers(settings: Settings, states: States) -> list[dict[str, Any]]:
    """Time the others on the same rows; what is extrapolated says so."""
    lam, rows = settings.peer_lam, settings.reference_rows
    problem = row_problem(states, lam, settings.kappa)
    total, samples = len(problem.energies), len(states.X)
    certified = Hybrid(settings.tol).solve(problem)
    results = []

    def note(name: str, seconds: float, W: Tensor, of: Tensor, remark: str) -> None:
        part = problem.take(of)
        objective = part.objective(W, part.residual_correlations(W))
        excess = (objective - certified.bound[of]) / objective
        sums = W[:, : problem.ball].abs().sum(1)
        results.append(
            {
                "solver": name,
                "seconds": seconds,
                "objective_above_bound": float(excess.max()),
                "max_row_sum": float(sums.max()),
                "zeros": float((W == 0).double().mean()),
                "remark": remark,
            }
        )

    everyone, some = torch.arange(total), torch.arange(rows)
    seconds, solution = timed(lambda: Hybrid(settings.tol).solve(problem), settings.repeats)
    note("ours", seconds, solution.W, everyone, "all rows certified")
    seconds, solution = timed(lambda: CVX(settings.tol).solve(problem.take(some)), 1)
    note("cvxpy, CLARABEL", seconds * total / rows, solution.W, some, f"extrapolated from {rows} rows")

    S = torch.cat((states.X, states.U), 1).double().numpy()
    gram = (problem.gram * samples).numpy()

    def lasso() -> Tensor:
        model = Lasso(lam, fit_intercept=False, precompute=gram, tol=1e-4, max_iter=100_000)
        return torch.tensor(np.stack([model.fit(S, states.Z[:, i].double().numpy()).coef_ for i in range(rows)]))

    seconds, W = timed(lasso, 1)
    note("sklearn Lasso, no ball", seconds * total / rows, W, some, f"extrapolated from {rows} rows")

    config = {"activation_fn": torch.relu, "device": "cpu", "atol": 1e-6, "kappa": settings.kappa}
    arrays = (states.X.T.numpy(), states.U.T.numpy(), states.Z.T.numpy(), states.Z[:, :1].T.numpy())
    admm = ADMMSolver(
        num_epoch_ab=settings.admm_steps, num_epoch_cd=0, lambda_z=lam * samples, lambda_y=lam * samples, rho_ab=1.0,
        rho_cd=1.0,
    )  # fmt: skip
    regressors, targets = torch.tensor(arrays[0]), torch.tensor(arrays[2])
    design = torch.hstack((regressors.T, torch.tensor(arrays[1]).T))

    def their_rows(solver: Any) -> Tensor:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = solver.parallel_solve_matrix(
                design, targets.T, is_y=False, n=problem.ball, kappa=settings.kappa, plot_loss=False, device="cpu"
            )
        return torch.tensor(found).double()

    seconds, W = timed(lambda: their_rows(admm), 1)
    factor = settings.example_steps / settings.admm_steps
    remark = f"{settings.admm_steps} steps; time extrapolated to the {settings.example_steps} of its example"
    note("torchidl ADMM", seconds * factor, W, everyone, remark)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        start = time.perf_counter()
        A, B, *_ = LeastSquareSolver().solve(*arrays, config)
        seconds = time.perf_counter() - start
    note("torchidl LeastSquare", seconds, torch.tensor(np.hstack((A, B))).double(), everyone, "no penalty, no ball")
    return results


def measure_growth(settings: Settings, states: States) -> list[dict[str, Any]]:
    """Time our solver on part of the rows and of the columns, and the moments on part of the samples."""
    whole = row_problem(states, settings.peer_lam, settings.kappa)
    results = []
    for part in (0.25, 0.5, 1.0):
        rows = torch.arange(0, len(whole.energies), round(1 / part))
        seconds, _ = timed(lambda rows=rows: Hybrid(settings.tol).solve(whole.take(rows)), settings.repeats)
        results.append({"what": "rows", "size": len(rows), "seconds": seconds})
        d, n = len(whole.penalty), whole.ball
        columns = torch.cat((torch.arange(n), torch.arange(n, d, round(1 / part))))
        smaller = replace(
            whole,
            gram=whole.gram[columns][:, columns],
            correlations=whole.correlations[:, columns],
            penalty=whole.penalty[columns],
        )
        seconds, _ = timed(lambda smaller=smaller: Hybrid(settings.tol).solve(smaller), settings.repeats)
        results.append({"what": "columns", "size": len(columns), "seconds": seconds})
        S, samples = torch.cat((states.X, states.U), 1), round(part * len(states.X))
        pairs = [(S[:samples], states.Z[:samples])]
        seconds, _ = timed(lambda pairs=pairs: accumulate(pairs), settings.repeats)
        results.append({"what": "samples (moments)", "size": samples, "seconds": seconds})
    return results


def measure_forward(settings: Settings) -> list[dict[str, Any]]:
    """Time a sparse model's predictions beside those of the same model without knowledge of its zeros."""
    results = []
    for n, p, q in settings.shapes:
        for density in settings.densities:
            torch.manual_seed(settings.seed)
            dense = ImplicitModel(n, p, q)
            with torch.no_grad():
                for parameter in dense.parameters():
                    parameter.mul_(torch.rand_like(parameter) < density)
                dense.A.mul_(0.5 / dense.A.abs().sum(1, keepdim=True).clamp_min(1e-9))
            model = SparseImplicitModel(dense)
            for batch in settings.batches:
                u = torch.randn(batch, p)
                contestants = {"sparse": partial(model, u), "dense": partial(dense, u)}
                with torch.no_grad():
                    times = timed_by_turns(contestants, settings.turns)
                    matrices = dict(zip("ABCD", model._matrices(), strict=True))
                results.append(
                    {
                        "shape": (n, p, q),
                        "density": density,
                        "batch": batch,
                        "milliseconds": times.spread("sparse").median,
                        "dense/sparse": times.ratio("dense", "sparse").median,
                        "compressed": "".join(name for name, matrix in matrices.items() if is_compressed(matrix)),
                    }
                )
                print(f"  forward {results[-1]}", flush=True)
    return results


def is_compressed(matrix: Any) -> bool:
    """Return whether a matrix is in compressed rows."""
    tensor = matrix if isinstance(matrix, Tensor) else matrix.tensors[0]
    return bool(tensor.layout == torch.sparse_csr)


def measure_memory(settings: Settings, teacher: nn.Module, inputs: Tensor) -> list[dict[str, Any]]:
    """Take the most memory that a whole fit holds beside its inputs, in batches of 2,000."""
    batches = {samples: inputs[:samples].split(2000) for samples in sorted(settings.samples)}
    return [
        {"samples": samples, "bytes": peak_bytes(lambda given=given: SIM(lam=1e-3).fit(teacher, given))}
        for samples, given in batches.items()
    ]


def run(settings: Settings) -> dict[str, Any]:
    """Measure everything."""
    torch.set_num_threads(max(settings.threads))
    teacher, inputs, test = trained_teacher(settings)
    results: dict[str, Any] = {
        "teacher_accuracy": accuracy(teacher, test),
        "memory": measure_memory(settings, teacher, inputs),
    }
    results |= {name: [] for name in ("moments", "rows", "peers", "growth", "forward")}
    for threads in settings.threads:
        torch.set_num_threads(threads)
        results["forward"] += [{"threads": threads, **row} for row in measure_forward(settings)]
        for samples in settings.samples:
            for rescaled in (True, False):
                states = recorded_states(teacher, inputs[:samples], rescaled=rescaled, kappa=settings.kappa)
                which = {"threads": threads, "samples": samples, "rescaled": rescaled}
                results["moments"].append({**which, "seconds": states.seconds})
                for lam in settings.lams:
                    solvers: list[AbstractRowSolver] = [Hybrid(settings.tol)]
                    if rescaled and lam >= 1e-3:
                        solvers.append(CoordinateDescent(settings.tol))
                    for solver in solvers:
                        row = measure_ours(settings, states, lam, solver)
                        results["rows"].append({**which, **row})
                        print(f"  {which} {row['solver']} lam={lam:g}: {row['seconds']:.2f} s", flush=True)
                if rescaled and samples == min(settings.samples):
                    results["peers"] += [{"threads": threads, **row} for row in measure_peers(settings, states)]
                if rescaled and samples == max(settings.samples):
                    results["growth"] += [{"threads": threads, **row} for row in measure_growth(settings, states)]
    return results


def markdown(results: dict[str, Any], described: dict[str, Any]) -> str:
    """Return the tables."""
    packages = ", ".join(f"{name} {version}" for name, version in described["packages"].items())
    lines = [
        "# SIM: from states to certified rows",
        "",
        f"{described['cpu']}, {described['cores']} cores, Python {described['python']};",
        f"{packages}; {described['time']}.",
        f"Teacher of {100 * results['teacher_accuracy']:.2f} % test accuracy. Medians, in seconds.",
    ]
    for threads in dict.fromkeys(row["threads"] for row in results["rows"]):
        lines += ["", f"## {threads} thread{'s' if threads > 1 else ''}", ""]
        lines += ["| samples | rescaled | moments |", "|---:|---|---:|"]
        lines += [
            f"| {row['samples']:,} | {'yes' if row['rescaled'] else 'no'} | {row['seconds']:.2f} |"
            for row in results["moments"]
            if row["threads"] == threads
        ]
        lines += ["", "From the moments until every row has a certified relative gap of 1e-4:", ""]
        lines += ["| samples | rescaled | lam | solver | seconds | worst gap | rows open | non-zeros | max row sum |"]
        lines += ["|---:|---|---:|---|---:|---:|---:|---:|---:|"]
        lines += [
            f"| {row['samples']:,} | {'yes' if row['rescaled'] else 'no'} | {row['lam']:g} | {row['solver']} | "
            f"{row['seconds']:.2f} | {row['worst_gap']:.0e} | {row['rows_open']} | {row['nonzeros']:,} | "
            f"{row['max_row_sum']:.6f} |"
            for row in results["rows"]
            if row["threads"] == threads
        ]
        lines += ["", "Beside others, on the smaller number of samples, rescaled, lam = 1e-3:", ""]
        lines += ["| solver | seconds | objective above our bound | max row sum | zeros | remark |"]
        lines += ["|---|---:|---:|---:|---:|---|"]
        lines += [
            f"| {row['solver']} | {row['seconds']:.1f} | {row['objective_above_bound']:.0e} | "
            f"{row['max_row_sum']:.3f} | {100 * row['zeros']:.0f} % | {row['remark']} |"
            for row in results["peers"]
            if row["threads"] == threads
        ]
        lines += ["", "Predictions of a sparse model, dense time / sparse time; in brackets what is compressed:", ""]
        rows = [row for row in results["forward"] if row["threads"] == threads]
        densities = list(dict.fromkeys(row["density"] for row in rows))
        kept = " | ".join(f"{100 * density:g} % kept" for density in densities)
        lines += [f"| hidden, inputs, outputs | samples | {kept} |"]
        lines += ["|---|---:|" + "---:|" * len(densities)]
        for shape, batch in dict.fromkeys((tuple(row["shape"]), row["batch"]) for row in rows):
            cells = [
                f"{row['dense/sparse']:.2f} ({row['compressed'] or '-'})"
                for row in rows
                if (tuple(row["shape"]), row["batch"]) == (shape, batch)
            ]
            lines.append(f"| {', '.join(map(str, shape))} | {batch:,} | " + " | ".join(cells) + " |")
    lines += ["", "Most memory that a whole fit holds beside its inputs:", "", "| samples | MiB |", "|---:|---:|"]
    lines += [f"| {row['samples']:,} | {row['bytes'] / 2**20:.1f} |" for row in results["memory"]]
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw how time grows with rows, columns and samples, to a PNG."""
    figure = Figure(figsize=(9, 3.2), dpi=130, layout="constrained")
    names = list(dict.fromkeys(row["what"] for row in results["growth"]))
    threads = results["growth"][0]["threads"]
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        rows = [row for row in results["growth"] if row["what"] == name and row["threads"] == threads]
        axes.plot([row["size"] for row in rows], [row["seconds"] for row in rows], "o-", color="#0072B2")
        axes.set(xlabel=name, ylabel="seconds", ylim=(0, None), xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
    figure.suptitle(f"lam = 1e-3, all rows certified; {threads} thread{'s' if threads > 1 else ''}")
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the three files, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="digits and few penalties, files named sim_smoke.*")
    parser.add_argument("--threads", type=int, nargs="+", default=list(Settings.threads), metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    settings = replace(Settings(), threads=tuple(options.threads))
    settings = settings.smoke() if options.smoke else settings
    warnings.simplefilter("ignore")  # of peers
    results = run(settings)
    described = environment(("torch", "numpy", "implicit-deep-learning", "torchidl", "cvxpy", "scikit-learn"))
    text = markdown(results, described)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("sim_smoke" if options.smoke else "sim")
    content = {"environment": described, "settings": asdict(settings), **results}
    path.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    path.with_suffix(".md").write_text(text)
    draw(results, path.with_suffix(".png"))
    print(f"\n{text}\nWritten: {path}.json, .md, .png")


if __name__ == "__main__":
    main()
