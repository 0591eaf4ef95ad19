"""Measure the table of README.md: seven models of a text, three seeds each.

    python examples/im_attention/table.py

Finished runs are looked up and an interrupted one continues, so the command can be stopped and given again.
"""

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from language_models import MODELS
from rich.console import Console
from train import Settings, tiny, train

from idl.training import EpochRecord, draw_training, exit_with_advice, spread

SEEDS = (0, 1, 2)
NAMES = {
    "explicit": "explicit",
    "wide": "explicit, wider",
    "softmax": "implicit softmax",
    "lipschitz": "implicit Lipschitz",
    "low-rank": "implicit softmax, A of rank 4",
    "continued": "explicit, trained on",
    "converted": "explicit, converted and trained on",
}

DRAWN = ("explicit", "wide", "softmax", "lipschitz")
"""The models of the picture; those that are trained on begin elsewhere."""


def main(
    dataset: Annotated[str, typer.Option(help="Which text.")] = Settings.dataset,
    smoke: Annotated[bool, typer.Option("--smoke", help="Two seeds of tiny models: does it work?")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the run folders.")] = Path("runs/im_attention-table"),
) -> None:
    """Run what is missing, print the table as Markdown and draw the curves of the first seed."""
    console = Console(stderr=True)  # so that the table alone can be sent to a file
    results = {model: list[dict[str, Any]]() for model in MODELS}
    with exit_with_advice():
        for seed in SEEDS[:2] if smoke else SEEDS:  # a seed of every model before the next
            for model in MODELS:
                settings = Settings(dataset=dataset, model=model, seed=seed)
                settings = tiny(settings) if smoke else settings
                results[model].append(train(settings, out / settings.name(), console))
    typer.echo(table(dataset, results))
    first = {NAMES[m]: [EpochRecord(**epoch) for epoch in results[m][0]["epochs"]] for m in DRAWN}
    draw_training(first, out / "training.png")


def table(dataset: str, results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table."""
    lines = [f"| {dataset} | parameters | training loss | test loss | steps | seconds |", "|---|---|---|---|---|---|"]
    for model, runs in results.items():
        last = [run["epochs"][-1] for run in runs]
        losses = [spread([epoch[f"{part}_loss"] for epoch in last], ".3f") for part in ("train", "test")]
        steps = (
            "" if runs[0]["equilibria"] is None else f"{statistics.mean(r['equilibria']['steps'] for r in runs):.1f}"
        )
        seconds = statistics.mean(run["seconds"] for run in runs)
        cells = [NAMES[model], f"{runs[0]['parameters']:,}", *losses, steps, f"{seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
