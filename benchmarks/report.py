"""The figures as Markdown tables of at most 110 columns, and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

Row = Mapping[str, Any]
Results = Mapping[str, Sequence[Row]]

# Blue, vermilion, green, purple, grey, told apart with any colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777")


def markdown(results: Results, environment: Mapping[str, Any]) -> str:
    """Return all sections."""
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    parts = [
        "# ImplicitModel: speed, accuracy and memory",
        f"{environment['cpu']}, {environment['cores']} cores, {environment['system']}, "
        f"Python {environment['python']};\n{packages};\n{environment['time']}.",
        "Times are medians in ms with the quartiles below them; ratios are medians of the ratios within a round.",
    ]
    for threads in dict.fromkeys(row["threads"] for row in results["training"]):
        chosen = {name: [row for row in rows if row["threads"] == threads] for name, rows in results.items()}
        parts.append(f"## {threads} thread{'s' if threads > 1 else ''}")
        parts += ["### Training step", *_training(chosen["training"])]
        parts += ["### Hard equilibria, forward", *_hard(chosen["hard"])]
        parts += ["### Low rank, training step", *_low_rank(chosen["low_rank"])]
    parts += ["## Memory of a training step", *_memory(results["memory"])]
    return "\n\n".join(parts) + "\n"


def draw(results: Results, path: Path) -> None:
    """Draw the training steps relative to the MLP, and error against time of the hard equilibria, to a PNG."""
    threads = results["training"][0]["threads"]
    figure = Figure(figsize=(11, 4.6), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    figure.suptitle(f"{threads} thread{'s' if threads > 1 else ''}")
    _draw_training(left, [row for row in results["training"] if row["threads"] == threads])
    _draw_hard(right, [row for row in results["hard"] if row["threads"] == threads])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.savefig(path)


def _training(rows: Sequence[Row]) -> list[str]:
    pairs = ("torchidl/ours", "torchdeq/ours", "ours/MLP", "ours/bare")
    body = [
        [
            _training_name(row),
            *(f"{row['ratios'][pair]['median']:.2f}" for pair in pairs),
            f"{row['forward_steps']} + {row['backward_steps']}",
            f"{row['residual']:.1e}",
        ]
        for row in rows
    ]
    return [
        _times("input/hidden/batch, row sum", rows, _training_name),
        _table(["input/hidden/batch, row sum", *pairs, "our steps", "residual"], body),
    ]


def _hard(rows: Sequence[Row]) -> list[str]:
    names = list(rows[0]["relative_error"])
    body = [
        [
            _hard_name(row),
            *(f"{row['relative_error'][name]:.0e}" for name in names),
            f"{row['steps']}",
            f"{100 * row['converged']:.0f} %",
            f"{row['ratios']['torchidl/ours']['median']:.2f}",
        ]
        for row in rows
    ]
    return [
        "Relative error against float64, what ours says of itself, and the time of torchidl over that of ours:",
        _table(["matrix, n", *names, "steps", "conv.", "time ratio"], body),
        _times("matrix, n", rows, _hard_name),
    ]


def _low_rank(rows: Sequence[Row]) -> list[str]:
    ratio = rows[0]["ratios"]["torchidl/ours"]["median"]
    return [_times("input/hidden/rank/batch", rows, _size_name), f"torchidl/ours: **{ratio:.1f}**"]


def _memory(rows: Sequence[Row]) -> list[str]:
    kinds = ("implicit", "unrolled")
    body = [
        [f"{row['iterations']}", *(_kib(row[kind][what]) for what in ("graph_bytes", "peak_bytes") for kind in kinds)]
        for row in rows
    ]
    header = ["iterations", *(f"{what}, {kind}" for what in ("graph", "peak") for kind in kinds)]
    return [
        "KiB beyond parameters and batch, kept by the graph after the forward and at the peak of the step:",
        _table(header, body),
        *(_growth(rows, start, kinds) for start in (0, -2)),
    ]


def _growth(rows: Sequence[Row], start: int, kinds: Sequence[str]) -> str:
    growth = ", ".join(f"{kind} {rows[-1][kind]['peak_bytes'] / rows[start][kind]['peak_bytes']:.3f}" for kind in kinds)
    return f"Peak at {rows[-1]['iterations']} iterations over that at {rows[start]['iterations']}: **{growth}**."


def _times(title: str, rows: Sequence[Row], name: Any) -> str:
    """Return two lines a row: the medians, and the quartiles below them."""
    contestants = list(rows[0]["milliseconds"])
    body = []
    for row in rows:
        spreads = [row["milliseconds"][contestant] for contestant in contestants]
        body.append([name(row), *(_number(spread["median"]) for spread in spreads)])
        body.append(["", *(f"{_number(spread['low'])}-{_number(spread['high'])}" for spread in spreads)])
    return _table([title, *contestants], body)


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, the first column to the left and the others to the right."""
    widths = [max(len(line[k]) for line in (header, *body)) for k in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return f"| {' | '.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])} |"

    rule = f"|{'|'.join(['-' * (widths[0] + 2), *('-' * (width + 1) + ':' for width in widths[1:])])}|"
    return "\n".join([line(header), rule, *map(line, body)])


def _number(milliseconds: float) -> str:
    return f"{milliseconds:.{max(0, 2 - (milliseconds >= 10) - (milliseconds >= 100))}f}"


def _kib(size: int) -> str:
    return f"{size / 1024:,.0f}"


def _size_name(row: Row) -> str:
    return "/".join(str(value) for value in row["size"].values())


def _training_name(row: Row) -> str:
    return f"{_size_name(row)}, {row['row_sum']:g}"


def _hard_name(row: Row) -> str:
    return f"{row['matrix']}, {row['hidden']}"


def _draw_training(axes: Axes, rows: Sequence[Row]) -> None:
    names = [name for name in rows[0]["milliseconds"] if name != "MLP"]
    width = 0.8 / len(names)
    for k, (name, colour) in enumerate(zip(names, (*_COLOURS[:3], _COLOURS[-1]), strict=True)):
        heights = [row["milliseconds"][name]["median"] / row["milliseconds"]["MLP"]["median"] for row in rows]
        places = [place + (k - (len(names) - 1) / 2) * width for place in range(len(rows))]
        axes.bar(places, heights, width, color=colour, label="bare products of ours" if name == "bare" else name)
    axes.axhline(1, color="black", linewidth=1)
    labels = [f"{_size_name(row)}\nrows {row['row_sum']:g}" for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=7, rotation=30)
    axes.set(yscale="log", ylabel="time relative to the explicit MLP", title="Training step (input/hidden/batch)")
    axes.set_ylim(top=2 * axes.get_ylim()[1])  # room for the legend
    _plain_ticks(axes)
    axes.legend(loc="upper center", ncols=len(names), frameon=False, fontsize=8)


def _plain_ticks(axes: Axes) -> None:
    low, high = axes.get_ylim()
    ticks = [tick for tick in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_hard(axes: Axes, rows: Sequence[Row]) -> None:
    sizes = list(dict.fromkeys(row["hidden"] for row in rows))
    for name, colour in zip(rows[0]["relative_error"], _COLOURS, strict=False):
        for hidden, marker in zip(sizes, "os", strict=False):
            chosen = [row for row in rows if row["hidden"] == hidden]
            axes.scatter(
                [row["milliseconds"][name]["median"] for row in chosen],
                [row["relative_error"][name] for row in chosen],
                color=colour,
                marker=marker,
                label=f"{name}, n={hidden}",
                alpha=0.8,
            )
    axes.set(xscale="log", yscale="log", xlabel="time of the forward (ms)", ylabel="relative error")
    axes.set_title("Hard equilibria: down and left is better")
    axes.set_ylim(top=300)  # room for the legend
    axes.legend(loc="upper left", ncols=2, frameon=False, fontsize=7)
