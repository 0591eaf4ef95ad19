"""Train one model on sequences: an ImplicitRNN, or one that it is compared with.

    python examples/im_rnn/train.py                              # the spiky series, ImplicitRNN
    python examples/im_rnn/train.py --dataset sunspots --model gru
    python examples/im_rnn/train.py --dataset argmax             # tested on up to 100,000 times its range
    python examples/im_rnn/train.py --smoke                      # seconds

Interrupted with Ctrl-C, the same command continues to the numbers of a run that was not.
"""

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from models import MODELS, build, parameters
from rich.console import Console
from torch import Tensor, nn

import idl.data
from idl.training import (
    Labelled,
    Recipe,
    Run,
    draw_forecast,
    evaluate,
    exit_with_advice,
    finished_run,
    usable_device,
)

RANGES = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)  # of the argmax task's test sequences; 1 is that of the training
_SERIES_SEED, _TEST_SEED = 0, 1  # the data of all runs are the same


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run."""

    dataset: str = "spiky"
    model: str = "implicit"
    hidden_dim: int = 20
    implicit_hidden_dim: int = 20
    epochs: int = 30
    batch_size: int = 100
    max_learning_rate: float = 1e-2
    length: int = 10  # steps of a sequence
    seed: int = 0
    device: str = "cpu"
    samples: int | None = None  # None is all of them

    def name(self) -> str:
        """Return the name of the run folder."""
        sizes = f"h{self.hidden_dim}-n{self.implicit_hidden_dim}"
        smoke = "-smoke" if self.samples else ""
        return f"{self.dataset}-{self.model}-{sizes}-seed{self.seed}{smoke}"


DEFAULTS = {
    "spiky": Settings(),
    "sunspots": Settings(dataset="sunspots", epochs=100, batch_size=32, length=20),
    "argmax": Settings(dataset="argmax", epochs=60),
}
"""The settings of each data set."""

_EPOCHS = ", ".join(f"{settings.epochs} for {name}" for name, settings in DEFAULTS.items())
Dataset = Enum("Dataset", {name: name for name in DEFAULTS}, type=str)  # type: ignore[misc]
Model = Enum("Model", {name: name for name in MODELS}, type=str)  # type: ignore[misc]


def load(settings: Settings) -> tuple[Labelled, Labelled]:
    """Return training and test sequences."""
    samples = settings.samples
    if settings.dataset == "argmax":
        return _argmax(samples or 10_000, settings.length, 1.0, _SERIES_SEED), argmax_test(settings, 1.0)
    series = idl.data.sunspots() if settings.dataset == "sunspots" else idl.data.spiky(seed=_SERIES_SEED)
    windows = idl.data.sliding_windows(series, settings.length)
    train = Labelled(windows.train_inputs[:samples], windows.train_targets[:samples])
    return train, Labelled(windows.test_inputs[:samples], windows.test_targets[:samples])


def argmax_test(settings: Settings, largest: float) -> Labelled:
    """Return test sequences of the argmax task with numbers up to ``largest``."""
    return _argmax(settings.samples or 3000, settings.length, largest, _TEST_SEED)


def _argmax(samples: int, length: int, largest: float, seed: int) -> Labelled:
    numbers, places = idl.data.rolling_argmax(samples, length, 0.0, largest, seed)
    return Labelled(numbers, places[:, -1])


def train(settings: Settings, out: Path, console: Console, fresh: bool = False) -> dict[str, object]:
    """Train, or continue, or look up the run in folder `out`; return its metrics."""
    return finished_run(settings, out, console, lambda run: _trained(settings, run), fresh=fresh)


def _trained(settings: Settings, run: Run) -> dict[str, object]:
    # 1. Data and model.
    train_data, test_data = load(settings)
    classes = settings.dataset == "argmax"
    sizes = (settings.hidden_dim, settings.implicit_hidden_dim)
    model = build(settings.model, 1, settings.length if classes else 1, settings.length, sizes, settings.seed)
    model.to(settings.device)

    # 2. Training.
    recipe = Recipe(settings.epochs, settings.batch_size, settings.max_learning_rate, settings.seed)
    history = run.fit(settings.model, model, train_data, test_data, recipe)

    # 3. What is known of the model now.
    metrics = {"parameters": parameters(model), **history.to_json()}
    if classes:
        ranges = {f"{largest:g}": evaluate(model, argmax_test(settings, largest))[1] for largest in RANGES}
        metrics["accuracy_by_range"] = ranges
        result = ", ".join(f"x{largest} {100 * (right or 0):.1f} %" for largest, right in ranges.items())
    else:
        draw_forecast(test_data.labels[:, 0], {settings.model: forecast(model, test_data)}, run.path / "forecast.png")
        result = f"mean square error {history.epochs[-1].test_loss:.3g}"
    run.console.print(f"Test: {result}; run folder {run.path}", soft_wrap=True)
    return metrics


def forecast(model: nn.Module, data: Labelled) -> Tensor:
    """Return what a model expects after each window."""
    with torch.no_grad():
        prediction: Tensor = model(data.inputs.to(next(model.parameters()).device))[:, 0]
    return prediction.cpu()


def main(
    dataset: Annotated[Dataset, typer.Option(help="What to learn.")] = Dataset["spiky"],  # type: ignore[valid-type]
    model: Annotated[Model, typer.Option(help="Which model.")] = Model["implicit"],  # type: ignore[valid-type]
    hidden_dim: Annotated[
        int, typer.Option(min=1, help="Size of the hidden state h of implicit; others have as many parameters.")
    ] = Settings.hidden_dim,
    implicit_hidden_dim: Annotated[
        int, typer.Option(min=1, help="Size of the equilibrium x of implicit; likewise.")
    ] = Settings.implicit_hidden_dim,
    epochs: Annotated[
        int | None, typer.Option(min=1, help=f"Passes over the training data; {_EPOCHS} by default.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Decides weights and order of samples.")
    ] = Settings.seed,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.", callback=usable_device)] = Settings.device,
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny run that shows that all works.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again, whatever was trained.")] = False,
    out: Annotated[Path | None, typer.Option(help="Run folder; by default one below runs/im_rnn.")] = None,
) -> None:
    """Train one model on sequences; an interrupted run continues."""
    settings = replace(
        DEFAULTS[dataset.value],
        model=model.value,
        hidden_dim=hidden_dim,
        implicit_hidden_dim=implicit_hidden_dim,
        seed=seed,
        device=device,
    )
    if smoke:
        settings = replace(settings, epochs=2, samples=300)
    settings = replace(settings, epochs=epochs or settings.epochs)
    with exit_with_advice():
        train(settings, out or Path("runs/im_rnn") / settings.name(), Console(), fresh)


if __name__ == "__main__":
    typer.run(main)
