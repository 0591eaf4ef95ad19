"""Train an explicit network, then make it a sparse, well-posed implicit model by SIM.

    python examples/sim/train.py                                     # FashionMNIST, lam = 1e-3
    python examples/sim/train.py --keep 0.15                         # 15 % of the teacher's weights
    python examples/sim/train.py --teacher cnn
    python examples/sim/train.py --smoke --dataset digits            # seconds, no download

Interrupted with Ctrl-C while the teacher trains, the same command continues to the numbers of a run that was not.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import idl.data
from idl import SIM
from idl.sim.solvers import Cardinality
from idl.training import (
    Labelled,
    Recipe,
    Run,
    draw_sparsity,
    exit_with_advice,
    finished_run,
    fit_supervised,
    progress_line,
    save_weights,
    stop_on_interrupt,
    usable_device,
)

VALIDATION = 1 / 12  # of the training images: 5,000 of 60,000
_BATCH = 2000


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run."""

    dataset: str = "fashion-mnist"
    teacher: str = "mlp"
    epochs: int = 10  # of the teacher
    batch_size: int = 128
    lam: float = 1e-3
    keep: float | None = None  # part of the teacher's weights; None is the l1 penalty
    samples: int | None = None  # that SIM sees; None is all of them
    seed: int = 0
    device: str = "cpu"
    training_images: int | None = None

    def name(self) -> str:
        """Return the name of the run folder."""
        how = f"keep{self.keep:g}" if self.keep else f"lam{self.lam:g}"
        some = f"-m{self.samples}" if self.samples else ""
        smoke = "-smoke" if self.training_images else ""
        return f"{self.dataset}-{self.teacher}-{how}{some}-seed{self.seed}{smoke}"


class Dataset(str, Enum):
    """What `idl.data.load` knows."""

    digits = "digits"
    fashion_mnist = "fashion-mnist"
    mnist = "mnist"


class TeacherKind(str, Enum):
    """The two explicit networks."""

    mlp = "mlp"
    cnn = "cnn"


@dataclass(frozen=True)
class Splits:
    """Images as rows; the validation images are the last of the training images."""

    train: Labelled
    validation: Labelled
    test: Labelled
    classes: int

    def on(self, device: str) -> "Splits":
        """Return the data on a device."""
        parts = (Labelled(*(t.to(device) for t in part)) for part in (self.train, self.validation, self.test))
        return Splits(*parts, self.classes)


def load_splits(dataset: str, training_images: int | None = None) -> Splits:
    """Return the data of a run; `training_images` limits all parts."""
    data = idl.data.load(dataset)
    train = Labelled(data.train_images.flatten(1), data.train_labels)
    test = Labelled(data.test_images.flatten(1), data.test_labels)
    if training_images is not None:
        train, test = (Labelled(*(t[:training_images] for t in part)) for part in (train, test))
    first = len(train.labels) - round(VALIDATION * len(train.labels))
    parts = (Labelled(*(t[which] for t in train)) for which in (slice(None, first), slice(first, None)))
    return Splits(*parts, test, len(data.classes))


class SmallCNN(nn.Module):
    """Two convolutions, a hidden layer and an output layer, without biases, on flattened square images."""

    def __init__(self, pixels: int, classes: int) -> None:
        super().__init__()
        self.side = round(pixels**0.5)
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 4, 5, stride=3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False),
            nn.ReLU(),
            nn.Flatten(),
        )
        features = self.convolutions(torch.zeros(1, 1, self.side, self.side)).shape[1]
        self.dense = nn.Sequential(nn.Linear(features, 32, bias=False), nn.ReLU(), nn.Linear(32, classes, bias=False))

    def forward(self, images: Tensor) -> Tensor:
        """Return one score per class."""
        scores: Tensor = self.dense(self.convolutions(images.reshape(-1, 1, self.side, self.side)))
        return scores


def build_teacher(kind: str, pixels: int, classes: int, seed: int) -> nn.Module:
    """Return an untrained teacher: 784-64-32-16-10 for images of 28 x 28, smaller for smaller images."""
    torch.manual_seed(seed)
    if kind == "cnn":
        return SmallCNN(pixels, classes)
    sizes = (pixels, 64, 32, 16, classes) if pixels > 100 else (pixels, 24, 16, classes)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def accuracy(model: nn.Module, data: Labelled) -> float:
    """Return the part of the labels that a model predicts."""
    with torch.no_grad():
        right = sum(
            int((model(u).argmax(1) == labels).sum())
            for u, labels in zip(data.inputs.split(_BATCH), data.labels.split(_BATCH), strict=True)
        )
    return right / len(data.labels)


class Shown:
    """Batches of inputs with a progress bar for each pass over them."""

    def __init__(self, inputs: Tensor, console: Console) -> None:
        self.batches, self.console, self.passes = inputs.split(_BATCH), console, 0

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the batches, from the first."""
        self.passes += 1
        columns = (TextColumn(f"SIM, pass {self.passes:<4}"), BarColumn(bar_width=14), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as progress:
            yield from progress.track(self.batches)


def train_teacher(settings: Settings, splits: Splits, checkpoint: Path, console: Console) -> nn.Module:
    """Return the trained teacher, from its checkpoint if that is there."""
    pixels = splits.train.inputs.shape[1]
    teacher = build_teacher(settings.teacher, pixels, splits.classes, settings.seed).to(settings.device)
    recipe = Recipe(settings.epochs, settings.batch_size, 5e-3, settings.seed)
    what = {name: getattr(settings, name) for name in ("dataset", "teacher", "training_images")}
    with stop_on_interrupt() as should_stop, progress_line("teacher", console) as show:
        fit_supervised(
            teacher,
            splits.train,
            splits.validation,
            recipe,
            checkpoint=checkpoint,
            settings=what,
            on_progress=show,
            should_stop=should_stop,
        )
    return teacher


def train(settings: Settings, out: Path, console: Console, fresh: bool = False) -> dict[str, object]:
    """Run, continue or look up the run in folder `out`; return its metrics."""
    # SIM's settings are checked before the teacher costs any time.
    if settings.keep is None:
        sim = SIM(lam=settings.lam)
    else:
        sim = SIM(Cardinality(keep=settings.keep), lam=settings.lam, refit="layers")
    return finished_run(settings, out, console, lambda run: _modelled(settings, sim, run), fresh=fresh)


def _modelled(settings: Settings, sim: SIM, run: Run) -> dict[str, object]:
    # 1. Data and teacher.
    splits = load_splits(settings.dataset, settings.training_images).on(settings.device)
    teacher = train_teacher(settings, splits, run.path / "checkpoint.safetensors", run.console)

    # 2. SIM: no label and no backpropagation from here on.
    started = time.perf_counter()
    sim.fit(teacher, Shown(splits.train.inputs[: settings.samples], run.console))
    seconds = time.perf_counter() - started

    # 3. What is left behind.
    model, certificate = sim.model_, sim.certificate_
    kept = certificate.weights_kept
    metrics = {
        "teacher_accuracy": accuracy(teacher, splits.test),
        "test_accuracy": accuracy(model, splits.test),
        "weights": kept.total,
        "teacher_weights": kept.teacher,
        "feasible": certificate.feasible,
        "seconds": seconds,
    }
    save_weights(run.path / "teacher.safetensors", teacher)
    save_weights(run.path / "weights.safetensors", model)
    title = f"{kept.total:,} weights, {100 * kept.fraction:.1f} % of the teacher's {kept.teacher:,}"
    matrices = (model.A, model.B, model.C, model.D)
    draw_sparsity(*matrices, run.path / "sparsity.png", title=title)
    run.console.print(str(certificate), highlight=False)
    run.console.print(
        f"Test accuracy {100 * metrics['test_accuracy']:.2f} %, teacher {100 * metrics['teacher_accuracy']:.2f} %; "
        f"run folder {run.path}",
        soft_wrap=True,
    )
    return metrics


def main(
    dataset: Annotated[
        Dataset | None, typer.Option(help="Images to classify; fashion-mnist by default, digits with --smoke.")
    ] = None,
    teacher: Annotated[TeacherKind, typer.Option(help="Explicit network to start from.")] = TeacherKind.mlp,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help=f"Passes over the training data, of the teacher; {Settings.epochs} by default."),
    ] = None,
    lam: Annotated[float, typer.Option(help="Weight of the l1 penalty, above 0.")] = Settings.lam,
    keep: Annotated[
        float | None, typer.Option(help="Part of the teacher's weights to keep instead, in (0, 1).")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Images that SIM sees; all by default.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Decides weights and order of samples.")
    ] = Settings.seed,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.", callback=usable_device)] = Settings.device,
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny run that shows that all works.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again, whatever was trained.")] = False,
    out: Annotated[Path | None, typer.Option(help="Run folder; by default one below runs/sim.")] = None,
) -> None:
    """Make an explicit network a sparse implicit model; an interrupted run continues."""
    dataset = dataset or (Dataset.digits if smoke else Dataset.fashion_mnist)  # a smoke run downloads nothing
    settings = Settings(dataset.value, teacher.value, lam=lam, keep=keep, samples=samples, seed=seed, device=device)
    if smoke:
        settings = replace(settings, epochs=8, batch_size=16, training_images=512)
    settings = replace(settings, epochs=epochs or settings.epochs)
    with exit_with_advice():
        train(settings, out or Path("runs/sim") / settings.name(), Console(), fresh)


if __name__ == "__main__":
    typer.run(main)
