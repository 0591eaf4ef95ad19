"""Train one classifier on images: an implicit model, or the explicit MLP that it is compared with.

    python examples/im/train.py                                      # FashionMNIST, full rank
    python examples/im/train.py --low-rank --rank 2
    python examples/im/train.py --model mlp
    python examples/im/train.py --smoke --dataset digits             # seconds, no download

Interrupted with Ctrl-C, the same command continues to the numbers of a run that was not.
"""

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import idl.data
from idl import ImplicitModel
from idl.training import (
    ExplicitMLP,
    Labelled,
    Recipe,
    Run,
    exit_with_advice,
    finished_run,
    report_equilibrium,
    usable_device,
)


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run."""

    dataset: str = "fashion-mnist"
    model: str = "implicit"
    hidden_dim: int = 100
    rank: int | None = None  # of A; None is a full matrix
    epochs: int = 8
    batch_size: int = 128
    max_learning_rate: float = 5e-3
    seed: int = 0
    device: str = "cpu"
    training_images: int | None = None  # None is all of them

    def name(self) -> str:
        """Return the name of the run folder."""
        rank = f"-rank{self.rank}" if self.rank else ""
        smoke = "-smoke" if self.training_images else ""
        return f"{self.dataset}-{self.model}-h{self.hidden_dim}{rank}-seed{self.seed}{smoke}"


class Dataset(str, Enum):
    """What `idl.data.load` knows."""

    digits = "digits"
    fashion_mnist = "fashion-mnist"
    mnist = "mnist"
    cifar10 = "cifar10"


class Model(str, Enum):
    """The two models; with the same hidden_dim and rank they have the same number of parameters."""

    implicit = "implicit"
    mlp = "mlp"


def train(settings: Settings, out: Path, console: Console, fresh: bool = False) -> dict[str, object]:
    """Train, or continue, or look up the run in folder `out`; return its metrics."""
    return finished_run(settings, out, console, lambda run: _trained(settings, run), fresh=fresh)


def _trained(settings: Settings, run: Run) -> dict[str, object]:
    # 1. The data, on the device once.
    data = idl.data.load(settings.dataset)
    train_data = Labelled(data.train_images.flatten(1), data.train_labels)
    test_data = Labelled(data.test_images.flatten(1), data.test_labels)
    if settings.training_images is not None:
        train_data = Labelled(*(tensor[: settings.training_images] for tensor in train_data))
        test_data = Labelled(*(tensor[: settings.training_images] for tensor in test_data))
    train_data, test_data = (Labelled(*(t.to(settings.device) for t in part)) for part in (train_data, test_data))

    # 2. The model. The seed decides its initial weights here, and the order of the samples in the recipe.
    torch.manual_seed(settings.seed)
    sizes = {
        "hidden_dim": settings.hidden_dim,
        "input_dim": train_data.inputs.shape[1],
        "output_dim": len(data.classes),
        "rank": settings.rank,
    }
    model: ImplicitModel | ExplicitMLP
    if settings.model == "implicit":
        model = ImplicitModel(**sizes, low_rank=settings.rank is not None)
    else:
        model = ExplicitMLP(**sizes)
    model.to(settings.device)

    # 3. Training.
    recipe = Recipe(settings.epochs, settings.batch_size, settings.max_learning_rate, settings.seed)
    history = run.fit(settings.model, model, train_data, test_data, recipe)

    # 4. What is known of the model now.
    metrics = {"parameters": sum(p.numel() for p in model.parameters()), **history.to_json()}
    if isinstance(model, ImplicitModel):
        metrics["equilibrium"] = report_equilibrium(model, test_data.inputs)._asdict()
    run.console.print(f"Test accuracy {100 * history.test_accuracy:.2f} %; run folder {run.path}", soft_wrap=True)
    return metrics


def main(
    dataset: Annotated[
        Dataset | None, typer.Option(help="Images to classify; fashion-mnist by default, digits with --smoke.")
    ] = None,
    model: Annotated[Model, typer.Option(help="Implicit model, or explicit MLP.")] = Model.implicit,
    hidden_dim: Annotated[
        int | None, typer.Option(min=1, help=f"Size of the hidden state; {Settings.hidden_dim} by default.")
    ] = None,
    low_rank: Annotated[bool, typer.Option("--low-rank", help="Make A a product L R^T.")] = False,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of A, with --low-rank.")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help=f"Passes over the training data; {Settings.epochs} by default.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Decides weights and order of samples.")
    ] = Settings.seed,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.", callback=usable_device)] = Settings.device,
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny run that shows that all works.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again, whatever was trained.")] = False,
    out: Annotated[Path | None, typer.Option(help="Run folder; by default one below runs/im.")] = None,
) -> None:
    """Train one classifier on images; an interrupted run continues."""
    if low_rank != (rank is not None):
        raise typer.BadParameter("--low-rank and --rank go together, as in --low-rank --rank 2")
    dataset = dataset or (Dataset.digits if smoke else Dataset.fashion_mnist)  # a smoke run downloads nothing
    settings = Settings(dataset.value, model.value, rank=rank, seed=seed, device=device)
    if smoke:
        settings = replace(settings, hidden_dim=16, epochs=2, batch_size=32, training_images=512)
    settings = replace(settings, hidden_dim=hidden_dim or settings.hidden_dim, epochs=epochs or settings.epochs)
    with exit_with_advice():
        train(settings, out or Path("runs/im") / settings.name(), Console(), fresh)


if __name__ == "__main__":
    typer.run(main)
