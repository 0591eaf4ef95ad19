"""Measure ImplicitRNN beside torchidl's, nn.GRU and nn.RNN, and parallel in time beside one after another.

    make bench-rnn                                # all of it, about fifteen minutes
    make bench-rnn ARGS="--smoke"                 # every section at toy size, in seconds
    make bench-rnn ARGS="--threads 1 --out runs/mine"

Writes implicit_rnn.json and .md to the folder of --out. Nothing here passes or fails.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torchidl
from measuring import Turns, environment, timed_by_turns
from torch import Tensor, nn

from idl import ImplicitRNN


@dataclass(frozen=True)
class Shape:
    """Sizes of a training step."""

    batch: int
    time: int
    hidden: int
    implicit: int
    rank: int | None = None


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is measured."""

    threads: tuple[int, ...] = (1, 2)
    seed: int = 0
    shapes: tuple[Shape, ...] = (Shape(100, 60, 22, 20, 2), Shape(100, 60, 128, 64), Shape(64, 256, 128, 128))
    stiff: tuple[Shape, ...] = (Shape(100, 60, 22, 20), Shape(100, 60, 128, 64))
    states: tuple[int, ...] = (4, 8, 16)
    times: tuple[int, ...] = (100, 1000, 10_000)
    batches: tuple[int, ...] = (1, 16)
    long_turns: Turns = Turns(seconds=8, fewest=2, most=20, warm=0, timed=1)  # noqa: RUF009, it is immutable
    turns: Turns = Turns(seconds=20, fewest=5, most=20, warm=1, timed=3)  # noqa: RUF009, it is immutable

    def smoke(self) -> "Settings":
        """Return the same at toy size."""
        tiny = (Shape(4, 5, 6, 5, 2), Shape(4, 5, 6, 5))
        turns = Turns(seconds=1, fewest=2, most=2, warm=0, timed=1)
        long = {"states": (4,), "times": (10, 30), "batches": (1, 2), "long_turns": turns}
        return replace(self, shapes=tiny, stiff=tiny[1:], turns=replace(turns, warm=1), **long)


class LastStep(nn.Module):
    """A recurrent module of PyTorch's, and a linear map of its state after the last step."""

    def __init__(self, recurrent: nn.RNNBase) -> None:
        super().__init__()
        self.recurrent, self.linear = recurrent, nn.Linear(recurrent.hidden_size, 1)

    def forward(self, sequences: Tensor) -> Tensor:
        """Return ``(batch, 1)``."""
        prediction: Tensor = self.linear(self.recurrent(sequences)[0][:, -1])
        return prediction


def training_step(model: nn.Module, sequences: Tensor, targets: Tensor) -> None:
    """Forward, mean square error and backward."""
    model.zero_grad()
    nn.functional.mse_loss(model(sequences), targets).backward()


def contestants(shape: Shape, seed: int) -> dict[str, nn.Module]:
    """Return models of the same hidden size."""
    sizes = {"input_dim": 1, "output_dim": 1, "hidden_dim": shape.hidden, "implicit_hidden_dim": shape.implicit}
    torch.manual_seed(seed)
    return {
        "ours": ImplicitRNN(**sizes, low_rank=shape.rank is not None, rank=shape.rank),
        "torchidl": torchidl.ImplicitRNN(**sizes, is_low_rank=shape.rank is not None, rank=shape.rank),
        "GRU": LastStep(nn.GRU(1, shape.hidden, batch_first=True)),
        "RNN": LastStep(nn.RNN(1, shape.hidden, batch_first=True)),
    }


def measure_steps(settings: Settings) -> list[dict[str, Any]]:
    """Time training steps."""
    results = []
    for shape in settings.shapes:
        models = contestants(shape, settings.seed)
        generator = torch.Generator().manual_seed(settings.seed)
        sequences = torch.randn(shape.batch, shape.time, 1, generator=generator)
        targets = torch.randn(shape.batch, 1, generator=generator)
        steps: dict[str, Callable[[], Any]] = {
            name: partial(training_step, model, sequences, targets) for name, model in models.items()
        }
        times = timed_by_turns(steps, settings.turns)
        results.append(
            {
                **asdict(shape),
                "milliseconds": times.json(),
                "torchidl/ours": times.ratio("torchidl", "ours").median,
                "ours/GRU": times.ratio("ours", "GRU").median,
            }
        )
        print(f"  step {results[-1]}", flush=True)
    return results


def measure_stiff(settings: Settings) -> list[dict[str, Any]]:
    """Time a stiff recurrence, rows of A >= 0 at .99, forward without gradient; with the error of each prediction."""
    results = []
    for shape in settings.stiff:
        models = contestants(replace(shape, rank=None), settings.seed)
        ours, theirs = models["ours"], models["torchidl"]
        generator = torch.Generator().manual_seed(settings.seed)
        A = torch.rand(shape.implicit, shape.implicit, generator=generator)
        A *= 0.9899 / A.sum(1, keepdim=True)
        state = ours.state_dict()
        state["cells.0.model.A"] = A
        state["cells.0.model.B"] = state["cells.0.model.B"].abs() / shape.implicit  # so that units are on
        ours.load_state_dict(state)
        peer = theirs.state_dict()
        for name in "ABCD":
            peer[f"recurrent.layer.{name}"] = state[f"cells.0.model.{name}"]
        peer |= {"linear.weight": state["readout.weight"], "linear.bias": state["readout.bias"]}
        theirs.load_state_dict(peer)
        sequences = torch.rand(shape.batch, shape.time, 1, generator=generator)
        exact = ImplicitRNN(1, 1, shape.hidden, shape.implicit, tol=1e-12, mitr=100_000).double()
        exact.load_state_dict(state)
        with torch.no_grad():
            truth = exact(sequences.double())
            times = timed_by_turns(
                {"ours": partial(ours, sequences), "torchidl": partial(theirs, sequences)}, settings.turns
            )
            errors = {
                name: float((model(sequences) - truth).norm() / truth.norm())
                for name, model in (("ours", ours), ("torchidl", theirs))
            }
        results.append({**asdict(shape), "milliseconds": times.json(), "error": errors})
        print(f"  stiff {results[-1]}", flush=True)
    return results


def measure_parallel(settings: Settings) -> list[dict[str, Any]]:
    """Time training steps on long sequences, solved one time after another and all times together.

    Fresh models, whose recurrence hardly forgets, and the same with B and D halved, whose recurrence does.
    """
    results = []
    for halved, n, batch, time in product((True, False), settings.states, settings.batches, settings.times):
        models = {}
        for parallel in (False, True):
            torch.manual_seed(settings.seed)
            model = ImplicitRNN(1, 1, n, n, activation="tanh", parallel_in_time=parallel)
            if halved:
                with torch.no_grad():
                    for matrix in (model.cells[0].model.B, model.cells[0].model.D):
                        matrix.div_(2)
            models["together" if parallel else "one by one"] = model
        generator = torch.Generator().manual_seed(settings.seed)
        sequences = torch.randn(batch, time, 1, generator=generator)
        targets = torch.randn(batch, 1, generator=generator)
        steps = {name: partial(training_step, model, sequences, targets) for name, model in models.items()}
        times = timed_by_turns(steps, settings.long_turns)
        with torch.no_grad():
            one, other = (model(sequences) for model in models.values())
        sizes = {"batch": batch, "time": time, "hidden": n, "implicit": n, "rank": None, "halved": halved}
        found = {"one by one / together": times.ratio(*models).median, "difference": float((one - other).abs().max())}
        results.append({**sizes, "milliseconds": times.json(), **found})
        print(f"  parallel {results[-1]}", flush=True)
    return results


def run(settings: Settings) -> dict[str, Any]:
    """Measure everything."""
    results: dict[str, Any] = {"steps": [], "stiff": [], "parallel": []}
    for threads in settings.threads:
        torch.set_num_threads(threads)
        sections = {"steps": measure_steps, "stiff": measure_stiff, "parallel": measure_parallel}
        for section, measure in sections.items():
            results[section] += [{"threads": threads, **row} for row in measure(settings)]
    return results


def markdown(results: dict[str, Any], described: dict[str, Any]) -> str:
    """Return the tables."""
    packages = ", ".join(f"{name} {version}" for name, version in described["packages"].items())
    lines = [
        "# ImplicitRNN",
        "",
        f"{described['cpu']}, {described['cores']} cores, Python {described['python']};",
        f"{packages}; {described['time']}. Medians, in ms.",
    ]
    for threads in dict.fromkeys(row["threads"] for row in results["steps"]):
        lines += ["", f"## {threads} thread{'s' if threads > 1 else ''}", "", "Training step:", ""]
        names = ("ours", "torchidl", "GRU", "RNN")
        lines += [f"| batch, time, hidden, implicit, rank | {' | '.join(names)} | torchidl / ours | ours / GRU |"]
        lines += ["|---|" + "---:|" * 6]
        for row in (row for row in results["steps"] if row["threads"] == threads):
            times = " | ".join(f"{row['milliseconds'][name]['median']:.1f}" for name in names)
            lines.append(f"| {described_shape(row)} | {times} | {row['torchidl/ours']:.2f} | {row['ours/GRU']:.2f} |")
        lines += ["", "Stiff, forward, A >= 0 with row sums .99; relative error of the predictions:", ""]
        lines += ["| batch, time, hidden, implicit | ours | error | torchidl | error |", "|---|---:|---:|---:|---:|"]
        for row in (row for row in results["stiff"] if row["threads"] == threads):
            cells = (
                f"{row['milliseconds'][name]['median']:.1f} | {row['error'][name]:.0e}" for name in ("ours", "torchidl")
            )
            lines.append(f"| {described_shape(row)} | {' | '.join(cells)} |")
        lines += [
            "",
            "Training step with tanh, one time after another and parallel in time; B and D halved, as drawn:",
            "",
        ]
        ways = ("one by one", "together")
        lines += [f"| batch, time, hidden, implicit | {' | '.join(2 * (*ways, 'ratio'))} |", "|---|" + "---:|" * 6]
        rows = [row for row in results["parallel"] if row["threads"] == threads]
        for halved, drawn in zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True):
            cells = (
                " | ".join([f"{row['milliseconds'][way]['median']:.1f}" for way in ways])
                + f" | {row['one by one / together']:.2f}"
                for row in (halved, drawn)
            )
            lines.append(f"| {described_shape(halved)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def described_shape(row: dict[str, Any]) -> str:
    """Return the sizes of a row."""
    return ", ".join(str(row[name]) for name in ("batch", "time", "hidden", "implicit", "rank") if row[name])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the files, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="toy size, files named implicit_rnn_smoke.*")
    parser.add_argument("--threads", type=int, nargs="+", default=list(Settings.threads), metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    settings = replace(Settings(), threads=tuple(options.threads))
    settings = settings.smoke() if options.smoke else settings
    warnings.simplefilter("ignore")  # of peers
    results = run(settings)
    described = environment(("torch", "implicit-deep-learning", "torchidl"))
    text = markdown(results, described)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("implicit_rnn_smoke" if options.smoke else "implicit_rnn")
    content = {"environment": described, "settings": asdict(settings), **results}
    path.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    path.with_suffix(".md").write_text(text)
    print(f"\n{text}\nWritten: {path}.json, .md")


if __name__ == "__main__":
    main()
