"""Measure the table of README.md: full rank and rank 2, implicit and explicit, three seeds each.

    python examples/im/table.py

Finished runs are looked up and an interrupted one continues, so the command can be stopped and given again.
"""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from train import Dataset, Settings, train

from idl.training import EpochRecord, draw_training, exit_with_advice, spread

SEEDS = (0, 1, 2)
MODELS = {
    "implicit, full rank": ("implicit", None),
    "MLP, full rank": ("mlp", None),
    "implicit, rank 2": ("implicit", 2),
    "MLP, rank 2": ("mlp", 2),
}


def main(
    dataset: Annotated[Dataset, typer.Option(help="Images to classify.")] = Dataset.fashion_mnist,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training data.")] = Settings.epochs,
    out: Annotated[Path, typer.Option(help="Folder of the run folders.")] = Path("runs/im-table"),
) -> None:
    """Run what is missing, print the table as Markdown and draw the full-rank runs of the first seed."""
    console = Console(stderr=True)  # so that the table alone can be sent to a file
    results = {}
    with exit_with_advice():
        for name, (model, rank) in MODELS.items():
            settings = Settings(dataset=dataset.value, model=model, rank=rank, epochs=epochs)
            runs = [replace(settings, seed=seed) for seed in SEEDS]
            results[name] = [train(run, out / run.name(), console) for run in runs]

    typer.echo(
        f"| {dataset.value}, {epochs} epochs | parameters | test accuracy (mean ± std, {len(SEEDS)} seeds) "
        "| equilibrium steps, median (max) | seconds a run |\n|---|---|---|---|---|"
    )
    for name, of_seeds in results.items():
        typer.echo(row(name, of_seeds))
    full_rank = [name for name, (_, rank) in MODELS.items() if rank is None]
    records = {name: [EpochRecord(**epoch) for epoch in results[name][0]["epochs"]] for name in full_rank}
    draw_training(records, out / "training.png")


def row(name: str, results: list[dict[str, object]]) -> str:
    """Return one line of the table; the standard deviation is that of a sample, with n - 1."""
    accuracies = [100 * result["test_accuracy"] for result in results]
    accuracy = f"{spread(accuracies)} %"
    steps = "-"
    if "equilibrium" in results[0]:
        reports = [result["equilibrium"] for result in results]
        median = statistics.median(report["steps_median"] for report in reports)
        steps = f"{median:g} ({max(report['steps_max'] for report in reports)})"
    seconds = statistics.mean(result["seconds"] for result in results)
    return f"| {name} | {results[0]['parameters']:,} | {accuracy} | {steps} | {seconds:.0f} |"


if __name__ == "__main__":
    typer.run(main)
