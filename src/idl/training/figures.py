"""Pictures of a training run and of an equilibrium, as PNG files.

Matplotlib is imported when a picture is drawn, and its global state is neither used nor changed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from idl.atomic import write_bytes
from idl.training.supervised import EpochRecord, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue, vermilion, green, purple of Okabe and Ito, told apart with any colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_LINES = (("-", "o"), ("--", "s"), (":", "^"))
"""Lines and markers of the first curves, one for each colour, of the next ones, and so on."""


def draw_training(histories: Mapping[str, Sequence[EpochRecord]], path: str | Path) -> None:
    """Draw loss and accuracy over the epochs, one colour per model, to a PNG; only the loss where numbers are learned.

    The axis of a loss that falls to less than a tenth is logarithmic.

    Args:
        histories: The records of each model by its name, 1 to 4 models with at least one epoch each.
        path: File to write; its folder must exist.

    Raises:
        TypeError: If something else than records is given, such as a whole :class:`History`.
        ValueError: If there are no or too many models, or one has no epoch.

    Example:
        >>> import tempfile
        >>> records = [EpochRecord(1.2, 0.5, 1.3, 0.4), EpochRecord(0.9, 0.7, 1.1, 0.6)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     draw_training({"implicit": records}, Path(folder) / "training.png")
    """
    _check_number("histories", histories, "models", len(_COLOURS))
    for name, records in histories.items():
        _check_records(name, records)
    from matplotlib.ticker import LogLocator, NullLocator

    classes = all(record.test_accuracy is not None for records in histories.values() for record in records)
    figure = _figure(9.0 if classes else 5.0, 3.8)
    parts = figure.subplots(1, 2 if classes else 1, squeeze=False)[0]
    for colour, (name, records) in zip(_COLOURS, histories.items(), strict=False):
        epochs = range(1, len(records) + 1)
        marker = "o" if len(records) <= 20 else None
        test = {"color": colour, "linewidth": 1.8, "marker": marker, "markersize": 4}
        train = {"color": colour, "linewidth": 1.2, "linestyle": (0, (4, 2))}  # dashes of 4, gaps of 2 points
        for axes, field, scale in zip(parts, ("loss", "accuracy"), (1, 100), strict=False):
            for part, style, which in (("train", train, "training"), ("test", test, "test")):
                values = [scale * getattr(record, f"{part}_{field}") for record in records]
                axes.plot(epochs, values, label=f"{name}, {which}", **style)
    unit = "cross entropy (nats)" if classes else "mean square error"
    parts[0].set(xlabel="epoch", ylabel=unit, title="Loss")
    if classes:
        parts[1].set(xlabel="epoch", ylabel="accuracy (%)", title="Accuracy")
    models = parts[0].get_legend_handles_labels()  # a column for each, below: four curves leave no room inside
    figure.legend(*models, loc="outside lower center", ncols=len(histories), frameon=False, fontsize="small")
    losses = [loss for records in histories.values() for r in records for loss in (r.train_loss, r.test_loss)]
    if max(losses) > 10 * min(losses) > 0:
        parts[0].set_yscale("log")
        parts[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        parts[0].yaxis.set_minor_locator(NullLocator())
    parts[0].yaxis.set_major_formatter("{x:g}")
    for axes in parts:
        axes.xaxis.get_major_locator().set_params(integer=True)
        _tidy(axes)
    _save(figure, path)


def draw_equilibrium(
    residuals: Float[Tensor, "steps batch"], A: Float[Tensor, "n n"], path: str | Path, *, rate: float
) -> None:
    r"""Draw how plain iteration reaches the equilibria of a batch, and the state matrix, to a PNG.

    Args:
        residuals: Residual of each step and sample, as from :func:`idl.training.picard_residuals`.
        A: The admissible state matrix; shown as its absolute values.
        path: File to write; its folder must exist.
        rate: Proved contraction per step; the picture shows ``rate ** step`` times the largest first
            residual.

    Raises:
        OSError: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> from idl.training import picard_residuals
        >>> A = torch.tensor([[0.5]])
        >>> residuals = picard_residuals(lambda x: torch.relu(x @ A.T + 1), torch.zeros(1, 1), tol=1e-6, max_steps=50)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     draw_equilibrium(residuals, A, Path(folder) / "equilibrium.png", rate=0.5)
    """
    figure = _figure(9.0, 3.8)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    values = residuals.detach().cpu().double()
    # A sample that has arrived has residual 0, which a log axis cannot show.
    values = values.clamp_min(values[values > 0].min().item() if bool((values > 0).any()) else 1.0)
    steps = range(len(values))
    left.fill_between(steps, values.amin(1).numpy(), values.amax(1).numpy(), color=_COLOURS[0], alpha=0.25, linewidth=0)
    left.plot(steps, values.median(1).values.numpy(), color=_COLOURS[0], linewidth=1.8)
    bound = [values[0].max().item() * rate**step for step in steps]
    left.plot(steps, bound, color=_COLOURS[1], linewidth=1.5, linestyle="--")
    samples = values.shape[1]
    left.set(xlabel="step", yscale="log", title=f"Iterating to the equilibrium, {samples} samples")
    left.set_ylim(bottom=values.median(1).values.min().item() / 10)  # the fastest samples may go on to 1e-17
    left.set_ylabel(r"residual $\|x_{t+1} - x_t\|_\infty$")
    left.legend(
        handles=[left.lines[0], left.collections[0], left.lines[1]],
        labels=["median", "all samples", rf"proved bound, factor {rate:.3g} a step"],
        loc="lower left",
        frameon=False,
    )
    left.xaxis.get_major_locator().set_params(integer=True)
    _tidy(left)

    magnitude = A.detach().abs().cpu().float()
    image = right.imshow(magnitude.numpy(), cmap="Blues", vmin=0, interpolation="nearest")
    norm = magnitude.sum(1).max().item()
    right.set(xlabel="column", ylabel="row", title=rf"$|A|$ with $\|A\|_\infty$ = {norm:.3f}")
    figure.colorbar(image, ax=right, label="absolute value of the entry", shrink=0.9)
    _save(figure, path)


def draw_sparsity(
    A: Float[Tensor, "n n"],
    B: Float[Tensor, "n p"],
    C: Float[Tensor, "q n"],
    D: Float[Tensor, "q p"],
    path: str | Path,
    *,
    title: str,
) -> None:
    """Draw which weights of ``[A B; C D]`` are not zero, to a PNG.

    Args:
        A: State matrix.
        B: Input matrix.
        C: Output matrix.
        D: Direct term.
        path: File to write; its folder must exist.
        title: Title of the picture.

    Raises:
        OSError: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> A, B, C, D = torch.eye(3), torch.ones(3, 5), torch.ones(2, 3), torch.zeros(2, 5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     draw_sparsity(A, B, C, D, Path(folder) / "sparsity.png", title="24 of 40 weights")
    """
    (n, p), q = B.shape, len(C)
    rows = [torch.cat(pair, 1).detach().cpu() != 0 for pair in ((A, B), (C, D))]
    pattern = torch.cat(rows).float()
    figure = _figure(9.0, min(max(9.0 * (n + q) / (n + p), 2.5), 7.0))
    axes = figure.subplots()
    axes.imshow(pattern.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.axvline(n - 0.5, color=_COLOURS[1], linewidth=1.2)
    axes.axhline(n - 0.5, color=_COLOURS[1], linewidth=1.2)
    axes.set_xticks([n / 2, n + p / 2], [f"{n} states", f"{p} inputs"])
    axes.set_yticks([n / 2, n + q / 2], [f"{n} states", f"{q} outputs"])
    axes.tick_params(length=0)
    axes.set_title(title)
    _save(figure, path)


def draw_forecast(
    truth: Float[Tensor, " times"], forecasts: Mapping[str, Float[Tensor, " times"]], path: str | Path
) -> None:
    """Draw a series and what models expected of each of its values, all of it and its last hundred, to a PNG.

    Args:
        truth: The values.
        forecasts: What each model expected, by its name, 1 to 4 models.
        path: File to write; its folder must exist.

    Raises:
        TypeError, ValueError: If there are no or too many models, or a forecast has another length than ``truth``.

    Example:
        >>> import tempfile
        >>> truth = torch.rand(50)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     draw_forecast(truth, {"the last value": truth.roll(1)}, Path(folder) / "forecast.png")
    """
    _check_number("forecasts", forecasts, "models", len(_COLOURS))
    for name, values in forecasts.items():
        if values.shape != truth.shape:
            raise ValueError(
                f"`forecasts` must be shaped like `truth`, {tuple(truth.shape)}; got {tuple(values.shape)} of {name!r}."
            )
    figure = _figure(9.0, 4.5)
    for axes, first in zip(figure.subplots(2, 1), (0, max(len(truth) - 100, 0)), strict=True):
        times = range(first, len(truth))
        axes.plot(times, truth[first:].tolist(), color="#333333", linewidth=1.0, label="series")
        for colour, (name, values) in zip(_COLOURS, forecasts.items(), strict=False):
            axes.plot(times, values[first:].tolist(), color=colour, linewidth=1.2, alpha=0.8, label=name)
        axes.set(ylabel="value, scaled", xlim=(first, len(truth) - 1))
        _tidy(axes)
    axes.set(xlabel="time")
    axes.legend(loc="lower right", ncols=len(forecasts) + 1, frameon=False)
    _save(figure, path)


def draw_tradeoff(curves: Mapping[str, Sequence[tuple[float, float]]], reference: float, path: str | Path) -> None:
    """Draw accuracy against the part of the weights kept, one line a method, to a PNG.

    Args:
        curves: Points of each method, 1 to 12 methods with at least one point each: weights kept in percent, from few
            to many, and accuracy in percent.
        reference: Accuracy of the network that all of them start from, in percent.
        path: File to write; its folder must exist.

    Raises:
        TypeError, ValueError: If there are no or too many methods, or one has no point.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     draw_tradeoff({"SIM": [(10.0, 85.0), (20.0, 88.0)]}, 89.0, Path(folder) / "tradeoff.png")
    """
    _check_number("curves", curves, "methods", len(_LINES) * len(_COLOURS))
    if empty := [name for name, points in curves.items() if len(points) == 0]:
        raise ValueError(f"`curves` must have at least one point of each method; got none of {', '.join(empty)}.")
    figure = _figure(9.0, 4.5)
    axes = figure.subplots()
    for i, (name, points) in enumerate(curves.items()):
        line, marker = _LINES[i // len(_COLOURS)]
        kept, accuracies = zip(*points, strict=True)
        colour = _COLOURS[i % len(_COLOURS)]
        axes.plot(kept, accuracies, color=colour, linestyle=line, marker=marker, markersize=4, label=name)
    axes.axhline(reference, color="#555555", linewidth=1.0, linestyle=(0, (4, 2)), label="teacher")
    axes.set(xlabel="weights kept (%)", ylabel="accuracy (%)", xscale="log")
    ticks = sorted({part for points in curves.values() for part, _ in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.set_ylim(bottom=max(reference - 20, 0), top=reference + 2)
    figure.legend(loc="outside right center", frameon=False)
    _tidy(axes)
    _save(figure, path)


def _check_number(name: str, parts: object, what: str, most: int) -> None:
    """Raise unless ``parts`` is a mapping of 1 to ``most`` entries."""
    if not isinstance(parts, Mapping):
        raise TypeError(f"`{name}` must be a mapping with the names of {what}; got a {type(parts).__name__}.")
    if not 1 <= len(parts) <= most:
        raise ValueError(f"`{name}` must have 1 to {most} {what}; got {len(parts)}.")


def _check_records(name: str, records: object) -> None:
    """Raise unless ``records`` are those of at least one epoch."""
    if not isinstance(records, Sequence) or not all(isinstance(record, EpochRecord) for record in records):
        advice = " Try its .epochs." if isinstance(records, History) else ""
        raise TypeError(
            f"`histories` must have a list of EpochRecord for {name!r}; got a {type(records).__name__}.{advice}"
        )
    if not records:
        raise ValueError(f"`histories` must have at least one epoch of each model; got none of {name!r}.")


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches; unlike pyplot's it belongs to nobody else."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _tidy(axes: Axes) -> None:
    """Take away the frame's right and upper side and add a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: str | Path) -> None:
    """Render, which needs no display outside of pyplot, and write the file whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_bytes(path, content.getvalue())
