"""Measure solvers where each unit reads few others, so that signs settle one after another: rings, chains, trees.

    make bench-rings                              # all of it, two minutes on two cores
    make bench-rings ARGS="--smoke"               # toy size, in seconds
    make bench-rings ARGS="--threads 1 --out runs/mine"

Writes few_neighbours.json and .md to the folder of --out. Nothing here passes or fails.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from contestants import Solve, state_solvers
from instances import FEW_NEIGHBOURS, INPUTS, exact_state, relative_error
from measuring import environment
from torch import Tensor

from idl import Adaptive, Picard, equilibrium
from idl.solvers import AbstractFixedPointSolver


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is measured."""

    threads: int = 2
    seed: int = 0
    sizes: tuple[int, ...] = (100, 400)
    row_sums: tuple[float, ...] = (0.99, 0.999)
    batch: int = 16
    solve: Solve = Solve(kappa=0.9999)  # noqa: RUF009, it is immutable
    more_steps: int = 1000
    plain_steps: int = 3000
    error: float = 1e-4  # relative, of a problem that counts as solved

    def smoke(self) -> "Settings":
        """Return the same at toy size."""
        return replace(self, sizes=(12,), row_sums=(0.99,), batch=2)


def contestants(A: Tensor, u: Tensor, settings: Settings) -> dict[str, Callable[[], Tensor]]:
    """Return calls that find the equilibrium, by name."""
    eye = torch.eye(len(A))

    def ours(solver: AbstractFixedPointSolver) -> Callable[[], Tensor]:
        return lambda: equilibrium(A, eye, u, solver=solver, on_failure="ignore").x

    calls = state_solvers(A, eye, u, settings.solve, constrained=True)
    del calls["deq anderson"]  # seconds a problem; implicit_model.py has it on stiff equilibria
    calls[f"ours, {settings.more_steps} steps"] = ours(Adaptive(max_steps=settings.more_steps))
    calls[f"our Picard, {settings.plain_steps} steps"] = ours(Picard(max_steps=settings.plain_steps))
    return calls


def attempted(solve: Callable[[], Tensor], like: Tensor) -> Tensor:
    """Return what ``solve`` returns, or NaN where it raises: a singular system of a peer's."""
    try:
        return solve()
    except torch.linalg.LinAlgError:
        return torch.full_like(like, torch.nan)


@torch.no_grad()
def run(settings: Settings) -> list[dict[str, Any]]:
    """Solve every problem once with each solver, one after another."""
    torch.set_num_threads(settings.threads)
    results = []
    for n, kind, row_sum, family in product(settings.sizes, INPUTS, settings.row_sums, FEW_NEIGHBOURS):
        torch.manual_seed(settings.seed)
        A = FEW_NEIGHBOURS[family](n)
        A *= row_sum / A.abs().sum(1, keepdim=True).clamp_min(1.0)
        u = INPUTS[kind](settings.batch, n)
        truth, residual = exact_state(A, torch.eye(n), u, plain_steps=4 * n)
        row: dict[str, Any] = {
            "n": n,
            "inputs": kind,
            "row_sum": row_sum,
            "family": family,
            "residual_of_truth": residual,
            "seconds": {},
            "error": {},
        }
        for name, solve in contestants(A, u, settings).items():
            start = time.perf_counter()
            x = attempted(solve, u)
            row["seconds"][name] = time.perf_counter() - start
            row["error"][name] = relative_error(x, truth)
        results.append(row)
        print(f"  {n} {row_sum} {kind}, {family}: {row['error']}", flush=True)
    return results


def markdown(rows: Sequence[dict[str, Any]], described: dict[str, Any], settings: Settings) -> str:
    """Return one table for each size: problems that were solved, and the seconds that all of them took."""
    packages = ", ".join(f"{name} {version}" for name, version in described["packages"].items())
    worst = max(row["residual_of_truth"] for row in rows)
    lines = [
        "# Units that read few others",
        "",
        f"{described['cpu']}, {described['cores']} cores, {settings.threads} threads, Python {described['python']};",
        f"{packages}; {described['time']}.",
        "",
        f"Problems solved to a relative error of {settings.error:.0e}, of {len(FEW_NEIGHBOURS)} matrices with row sums",
        f"of {' and '.join(f'{row_sum:g}' for row_sum in settings.row_sums)} each; the seconds of all of them, batch "
        f"{settings.batch}, float32.",
        f"They are compared with solutions in float64 of a relative residual of {worst:.0e} at most.",
    ]
    names = list(rows[0]["seconds"])
    for n in settings.sizes:
        lines += ["", f"| n = {n}, inputs | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
        for kind in (*INPUTS, "slowest"):
            chosen = [row for row in rows if row["n"] == n and kind in (row["inputs"], "slowest")]
            if kind == "slowest":
                cells = [f"{max(row['seconds'][name] for row in chosen):.2f} s" for name in names]
            else:
                cells = [
                    f"{sum(row['error'][name] <= settings.error for row in chosen)} of {len(chosen)}, "
                    f"{sum(row['seconds'][name] for row in chosen):.1f} s"
                    for name in names
                ]
            lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the files, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="toy size, files named few_neighbours_smoke.*")
    parser.add_argument("--threads", type=int, default=Settings.threads, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    settings = replace(Settings(), threads=options.threads)
    settings = settings.smoke() if options.smoke else settings
    warnings.simplefilter("ignore")  # of peers, and of solves that fail, which are counted
    rows = run(settings)
    described = environment(("torch", "implicit-deep-learning", "torchidl", "torchdeq"))
    text = markdown(rows, described, settings)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("few_neighbours_smoke" if options.smoke else "few_neighbours")
    content = {"environment": described, "settings": asdict(settings), "problems": rows}
    path.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    path.with_suffix(".md").write_text(text)
    print(f"\n{text}\nWritten: {path}.json, .md")


if __name__ == "__main__":
    main()
