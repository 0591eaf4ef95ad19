"""One run of an example: looked up, continued or trained, and what it leaves behind."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from idl.data import DatasetError
from idl.training.figures import draw_training
from idl.training.interruption import stop_on_interrupt
from idl.training.labelled import Labelled
from idl.training.progress import progress_line
from idl.training.runs import RunFolder, check_json, save_weights
from idl.training.supervised import History, Recipe, fit_supervised

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from rich.console import Console


@dataclass(frozen=True)
class Run:
    """What the work of a run is done with.

    Args:
        path: Its folder, for what else it leaves behind.
        settings: Everything that decides its numbers, as JSON values.
        console: Where it shows how far it is.

    Example:
        See :func:`finished_run`.
    """

    path: Path
    settings: Mapping[str, object]
    console: Console

    def fit(self, label: str, model: nn.Module, train: Labelled, test: Labelled, recipe: Recipe) -> History:
        """Train a model under a progress bar, from the checkpoint if there is one; save its weights and its curves.

        Args:
            label: Name of the model, up to 14 characters.
            model: The model, changed in place.
            train: Training data.
            test: Data that each epoch ends with an evaluation on.
            recipe: How to train.

        Raises:
            CheckpointError: If the checkpoint cannot be continued from.
            KeyboardInterrupt: If Ctrl-C ended the training; the checkpoint is written.
        """
        with stop_on_interrupt() as should_stop, progress_line(label, self.console) as show:
            history = fit_supervised(
                model,
                train,
                test,
                recipe,
                checkpoint=self.path / "checkpoint.safetensors",
                settings=dict(self.settings),
                on_progress=show,
                should_stop=should_stop,
            )
        save_weights(self.path / "weights.safetensors", model)
        draw_training({label: history.epochs}, self.path / "training.png")
        return history


def finished_run(
    settings: DataclassInstance,
    out: str | Path,
    console: Console,
    work: Callable[[Run], Mapping[str, Any]],
    *,
    fresh: bool = False,
) -> dict[str, Any]:
    """Return the metrics of the run in folder ``out``: looked up if it has finished, else from ``work``.

    Args:
        settings: Everything that decides the numbers of the run.
        out: Its folder. An interrupted run of the same settings in it goes on.
        console: Where progress goes.
        work: Trains, leaves its files in the folder, and returns the metrics as JSON values. They are written last:
            they mark the run as finished.
        fresh: Whether to start again, whatever the folder holds of a run.

    Raises:
        FileExistsError: If ``out`` is a file or holds files that no run wrote.
        ValueError: If the folder holds a run with other settings.
        TypeError, ValueError: If JSON has no form for a setting or a result, or ``work`` returns no mapping.

    Example:
        >>> import tempfile
        >>> from rich.console import Console
        >>> @dataclass(frozen=True)
        ... class Settings:
        ...     seed: int = 0
        >>> def work(run):
        ...     print("working")
        ...     return {"test_loss": 0.5}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for _ in range(2):  # the second time it is looked up
        ...         finished_run(Settings(), Path(folder) / "run", Console(quiet=True), work)
        working
        {'test_loss': 0.5}
        {'test_loss': 0.5}
    """
    values = asdict(settings)
    check_json("settings", values)
    folder = RunFolder.open(out)
    checkpoint = folder.path / "checkpoint.safetensors"
    if fresh:
        checkpoint.unlink(missing_ok=True)
    elif (metrics := folder.finished(values)) is not None:
        console.print(f"Finished already (--fresh starts again): {out}", soft_wrap=True)
        return metrics
    folder.start(values)
    results: object = work(Run(folder.path, values, console))
    if not isinstance(results, Mapping):
        raise TypeError(f"`work` must return the metrics, a mapping from names to JSON values; got {results!r}.")
    metrics = dict(results)
    folder.finish(metrics)
    checkpoint.unlink(missing_ok=True)
    return metrics


@contextmanager
def exit_with_advice() -> Iterator[None]:
    """Turn what ends a command early into a line on standard error and an exit code: 130 for Ctrl-C, else 1.

    The errors meant here say themselves what to do. After Ctrl-C the same command, without ``--fresh``, continues.

    Raises:
        typer.Exit: Of that code, instead of what came.

    Example:
        >>> import typer
        >>> try:
        ...     with exit_with_advice():
        ...         raise ValueError("`epochs` must be an integer >= 1; got 0.")
        ... except typer.Exit as end:
        ...     end.exit_code
        1
    """
    import typer

    try:
        yield
    except KeyboardInterrupt:
        command = shlex.join(["python", *(argument for argument in sys.argv if argument != "--fresh")])
        typer.echo(f"Interrupted. To continue where it stopped: {command}", err=True)
        raise typer.Exit(130) from None
    except (ImportError, OSError, ValueError, DatasetError) as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None


def usable_device(name: str) -> str:
    """Return the name of a device if this PyTorch can use it; for ``callback=`` of an option.

    Raises:
        typer.BadParameter: If it cannot.

    Example:
        >>> usable_device("cpu")
        'cpu'
    """
    import typer

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"this PyTorch cannot use the device {name!r} ({error})") from None
    return name
