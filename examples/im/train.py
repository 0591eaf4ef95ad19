"""Train one classifier on images: an implicit model, or the explicit MLP that it is compared with.

    python examples/im/train.py                                      # FashionMNIST, full rank
    python examples/im/train.py --low-rank --rank 2
    python examples/im/train.py --model mlp
    python examples/im/train.py --smoke --dataset digits             # seconds, no download

Interrupted with Ctrl-C, the same command continues to the numbers of a run that was not.
"""

import shlex
import sys
from dataclasses import asdict, dataclass, replace
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
    RunFolder,
    draw_training,
    fit_supervised,
    progress_line,
    report_equilibrium,
    save_weights,
    stop_on_interrupt,
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
    # 1. The run folder: a finished run is looked up, an interrupted one goes on.
    folder = RunFolder.open(out)
    checkpoint = folder.path / "checkpoint.safetensors"
    if fresh:
        checkpoint.unlink(missing_ok=True)
    elif (metrics := folder.finished(asdict(settings))) is not None:
        console.print(f"Finished already (--fresh trains again): {out}", soft_wrap=True)
        return metrics

    # 2. The data, on the device once.
    data = idl.data.load(settings.dataset)
    train_data = Labelled(data.train_images.flatten(1), data.train_labels)
    test_data = Labelled(data.test_images.flatten(1), data.test_labels)
    if settings.training_images is not None:
        train_data = Labelled(*(tensor[: settings.training_images] for tensor in train_data))
        test_data = Labelled(*(tensor[: settings.training_images] for tensor in test_data))
    train_data, test_data = (Labelled(*(t.to(settings.device) for t in part)) for part in (train_data, test_data))

    # 3. The model. The seed decides its initial weights here, and the order of the samples in the recipe.
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

    # 4. Training.
    folder.start(asdict(settings))
    recipe = Recipe(settings.epochs, settings.batch_size, settings.max_learning_rate, settings.seed)
    with stop_on_interrupt() as should_stop, progress_line(settings.model, console) as show:
        history = fit_supervised(
            model,
            train_data,
            test_data,
            recipe,
            checkpoint=checkpoint,
            settings=asdict(settings),
            on_progress=show,
            should_stop=should_stop,
        )

    # 5. What is left behind. The metrics come last: they mark the run as finished.
    metrics = {"parameters": sum(p.numel() for p in model.parameters()), **history.to_json()}
    if isinstance(model, ImplicitModel):
        metrics["equilibrium"] = report_equilibrium(model, test_data.inputs)._asdict()
    save_weights(folder.path / "weights.safetensors", model)
    draw_training({settings.model: history.epochs}, folder.path / "training.png")
    folder.finish(metrics)
    checkpoint.unlink(missing_ok=True)
    accuracy = 100 * history.test_accuracy
    console.print(f"Test accuracy {accuracy:.2f} %; run folder {out}", soft_wrap=True)
    return metrics


def main(
    dataset: Annotated[Dataset, typer.Option(help="Images to classify.")] = Dataset.fashion_mnist,
    model: Annotated[Model, typer.Option(help="Implicit model, or explicit MLP.")] = Model.implicit,
    hidden_dim: Annotated[int, typer.Option(min=1, help="Size of the hidden state.")] = Settings.hidden_dim,
    low_rank: Annotated[bool, typer.Option("--low-rank", help="Make A a product L R^T.")] = False,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of A, with --low-rank.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training data.")] = Settings.epochs,
    seed: Annotated[int, typer.Option(min=0, help="Decides weights and order of samples.")] = Settings.seed,
    device: Annotated[str, typer.Option(help="Where to train, such as cpu or cuda.")] = Settings.device,
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny run that shows that all works.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again, whatever was trained.")] = False,
    out: Annotated[Path | None, typer.Option(help="Run folder; by default one below runs/im.")] = None,
) -> None:
    """Train one classifier on images; an interrupted run continues."""
    if low_rank != (rank is not None):
        raise typer.BadParameter("--low-rank and --rank go together, as in --low-rank --rank 2")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"this PyTorch cannot use the device {device!r} ({error})") from None
    settings = Settings(dataset.value, model.value, hidden_dim, rank, epochs=epochs, seed=seed, device=device)
    if smoke:
        settings = replace(settings, hidden_dim=16, epochs=2, batch_size=32, training_images=512)
    try:
        train(settings, out or Path("runs/im") / settings.name(), Console(), fresh)
    except KeyboardInterrupt:
        command = shlex.join(["python", *(argument for argument in sys.argv if argument != "--fresh")])
        typer.echo(f"Interrupted. To continue where it stopped: {command}", err=True)
        raise typer.Exit(130) from None
    except (OSError, ValueError, idl.data.DatasetError) as error:  # all say what to do
        typer.echo(error, err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
