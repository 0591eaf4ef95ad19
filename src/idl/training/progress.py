"""One line on the terminal that shows where a training run is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from idl.training.supervised import Progress

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def progress_line(label: str, console: Console) -> Iterator[Callable[[Progress], None]]:
    """Show a progress bar with epoch, loss, accuracy and time left, which fits 80 columns.

    On something other than a terminal only its last state is written.

    Args:
        label: Name of the model, up to 14 characters.
        console: Where to show it.

    Yields:
        A function to call with the progress, as ``on_progress`` of :func:`idl.training.fit_supervised`.

    Example:
        >>> from rich.console import Console
        >>> with progress_line("implicit", Console(quiet=True)) as show:
        ...     show(Progress(step=50, total_steps=100, epoch=1, epochs=2, loss=0.9, accuracy=None))
    """
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn(f"{label:<14}"),
        BarColumn(bar_width=14),
        TaskProgressColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
    )
    with bar:
        task = bar.add_task("", total=None)

        def show(progress: Progress) -> None:
            accuracy = "" if progress.accuracy is None else f" acc {100 * progress.accuracy:.1f} %"
            text = f"epoch {progress.epoch}/{progress.epochs} loss {progress.loss:.3g}{accuracy}"
            bar.update(task, completed=progress.step, total=progress.total_steps, description=text)

        yield show
