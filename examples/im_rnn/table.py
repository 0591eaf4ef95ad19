"""Measure the tables of README.md: five models of the same size on three data sets, five seeds each.

    python examples/im_rnn/table.py

Finished runs are looked up and an interrupted one continues, so the command can be stopped and given again.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from models import MODELS
from rich.console import Console
from train import DEFAULTS, RANGES, Settings, load, train

from idl.training import exit_with_advice, spread

SEEDS = (0, 1, 2, 3, 4)
FORMS = (".3g", ".2g")  # of means and deviations, which differ by powers of ten
NAMES = {"implicit": "ImplicitRNN", "lstm": "LSTM", "gru": "GRU", "relu": "ReLU RNN without biases", "linear": "linear"}
Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def main(
    smoke: Annotated[bool, typer.Option("--smoke", help="Two seeds, 300 sequences: does it work?")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the run folders.")] = Path("runs/im_rnn-table"),
) -> None:
    """Run what is missing and print the tables as Markdown."""
    console = Console(stderr=True)  # so that the tables alone can be sent to a file
    results: dict[str, Runs] = {}
    with exit_with_advice():
        for dataset, settings in DEFAULTS.items():
            results[dataset] = {model: runs(settings, model, smoke, out, console) for model in MODELS}
    typer.echo("\n\n".join((*map(forecasts, results, results.values()), extrapolation(results["argmax"]))))


def runs(settings: Settings, model: str, smoke: bool, out: Path, console: Console) -> list[dict[str, Any]]:
    """Return the metrics of all seeds."""
    settings = replace(settings, model=model)
    if smoke:
        settings = replace(settings, epochs=2, samples=300)
    of_seeds = [replace(settings, seed=seed) for seed in (SEEDS[:2] if smoke else SEEDS)]
    return [train(run, out / run.name(), console) for run in of_seeds]


def forecasts(dataset: str, models: Runs) -> str:
    """Return the table of the losses of a data set."""
    lines = [f"| {dataset} | parameters | training loss | test loss | seconds |", "|---|---|---|---|---|"]
    for model, of_seeds in models.items():
        last = [run["epochs"][-1] for run in of_seeds]
        losses = [spread([epoch[f"{part}_loss"] for epoch in last], *FORMS) for part in ("train", "test")]
        seconds = statistics.mean(run["seconds"] for run in of_seeds)
        lines.append(f"| {NAMES[model]} | {of_seeds[0]['parameters']:,} | {' | '.join(losses)} | {seconds:.0f} |")
    if dataset != "argmax":
        train_loss, test_loss = least_squares(DEFAULTS[dataset])
        weights = DEFAULTS[dataset].length + 1
        lines.append(f"| linear, least squares | {weights} | {train_loss:.3g} | {test_loss:.3g} | 0 |")
    return "\n".join(lines)


def least_squares(settings: Settings) -> tuple[float, float]:
    """Return the mean square errors of the linear map, with a constant, that fits the training windows best."""
    data = load(settings)
    (A, b), (A_test, b_test) = ((torch.nn.functional.pad(u.flatten(1), (0, 1), value=1.0), y) for u, y in data)
    weights = torch.linalg.lstsq(A.double(), b.double()).solution
    pairs = ((A, b), (A_test, b_test))
    train_loss, test_loss = (float((inputs.double() @ weights - y).square().mean()) for inputs, y in pairs)
    return train_loss, test_loss


def extrapolation(models: Runs) -> str:
    """Return the table of accuracies by the range of the test sequences."""
    names = [f"{largest:g}" for largest in RANGES]
    lines = ["| argmax, accuracy in % | " + " | ".join(f"x{name}" for name in names) + " |"]
    lines.append("|---|" + "---|" * len(names))
    for model, of_seeds in models.items():
        cells = [spread([100 * run["accuracy_by_range"][name] for run in of_seeds], *FORMS) for name in names]
        lines.append(f"| {NAMES[model]} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
