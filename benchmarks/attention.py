"""Measure implicit attention beside explicit attention.

    make bench-attention                                # all of it, about three minutes
    make bench-attention ARGS="--smoke"                 # every section at toy size, in seconds
    make bench-attention ARGS="--threads 1 --out runs/mine"

Writes attention.json and .md to the folder of --out. Nothing here passes or fails.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import Turns, environment, peak_bytes, timed_by_turns
from torch import Tensor, nn
from torch.nn import functional as F

from idl import IDLAttention, IDLHead


@dataclass(frozen=True)
class Shape:
    """Sizes of a step."""

    batch: int
    time: int
    n_embd: int
    head_size: int


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is measured."""

    threads: tuple[int, ...] = (1, 2)
    seed: int = 0
    tol: float = 1e-5
    shapes: tuple[Shape, ...] = (Shape(8, 256, 384, 192), Shape(8, 256, 384, 64))
    steps: tuple[int, ...] = (5, 10, 20, 40)
    several: tuple[Shape, ...] = (Shape(8, 128, 384, 32), Shape(1, 64, 384, 32))
    heads: int = 12
    turns: Turns = Turns(seconds=15, fewest=5, most=20, warm=1, timed=3)  # noqa: RUF009, it is immutable

    def smoke(self) -> "Settings":
        """Return the same at toy size."""
        tiny = Shape(2, 8, 16, 4)
        turns = Turns(seconds=1, fewest=1, most=1, warm=1, timed=2)
        return replace(self, shapes=(tiny,), steps=(3, 6), several=(tiny,), heads=3, turns=turns)


class ExplicitHead(nn.Module):
    """One explicit causal head, by torch's kernel."""

    def __init__(self, head_size: int, n_embd: int) -> None:
        super().__init__()
        self.projection = nn.Linear(n_embd, 3 * head_size, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """Return ``(batch, time, head_size)``."""
        k, q, v = self.projection(u).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Several(nn.Module):
    """Heads one after another, and a projection."""

    def __init__(self, heads: Sequence[nn.Module], head_size: int, n_embd: int) -> None:
        super().__init__()
        self.heads, self.projection = nn.ModuleList(heads), nn.Linear(len(heads) * head_size, n_embd, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """Return ``(batch, time, n_embd)``."""
        outputs: Tensor = self.projection(torch.cat([head(u) for head in self.heads], -1))
        return outputs


def training_step(module: nn.Module, u: Tensor) -> None:
    """Forward, mean square and backward."""
    module.zero_grad()
    module(u).square().mean().backward()


def tokens(shape: Shape, seed: int) -> Tensor:
    """Return normalised tokens, as a layer norm gives them."""
    generator = torch.Generator().manual_seed(seed)
    return F.layer_norm(torch.randn(shape.batch, shape.time, shape.n_embd, generator=generator), (shape.n_embd,))


def head(shape: Shape, settings: Settings, version: str, **options: Any) -> IDLHead:
    """Return an implicit head."""
    torch.manual_seed(settings.seed)
    tolerances = {"tol": settings.tol, "grad_tol": settings.tol, **options}
    return IDLHead(shape.head_size, shape.n_embd, shape.time, 100, version, **tolerances)  # type: ignore[arg-type]


def measure_heads(settings: Settings) -> list[dict[str, Any]]:
    """Time a training step of one head, converged, beside an explicit one."""
    results = []
    for shape in settings.shapes:
        u = tokens(shape, settings.seed)
        modules = {
            "explicit": ExplicitHead(shape.head_size, shape.n_embd),
            "softmax": head(shape, settings, "softmax"),
            "lipschitz": head(shape, settings, "lipschitz"),
            "rank 4": head(shape, settings, "softmax", is_low_rank=True, rank=4),
        }
        steps: dict[str, Callable[[], Any]] = {
            name: partial(training_step, module, u) for name, module in modules.items()
        }
        times = timed_by_turns(steps, settings.turns)
        taken = {
            name: int(module(u, return_solution=True)[1].steps.max())
            for name, module in modules.items()
            if isinstance(module, IDLHead)
        }
        ratios = {name: times.ratio(name, "explicit").median for name in taken}
        results.append({**asdict(shape), "milliseconds": times.json(), "steps": taken, "times explicit": ratios})
        print(f"  head {results[-1]}", flush=True)
    return results


def measure_steps(settings: Settings) -> list[dict[str, Any]]:
    """Measure time and peak memory of a training step at a fixed number of forward steps."""
    results = []
    for shape in settings.shapes:
        u = tokens(shape, settings.seed)
        explicit = ExplicitHead(shape.head_size, shape.n_embd)
        for gradient in ("implicit", "unrolled"):
            for steps in settings.steps:
                options = {"tol": 0.0, "grad_tol": settings.tol, "gradient": gradient, "on_failure": "ignore"}
                torch.manual_seed(settings.seed)
                module = IDLHead(shape.head_size, shape.n_embd, shape.time, steps, "softmax", **options)
                contestants = {
                    "explicit": partial(training_step, explicit, u),
                    gradient: partial(training_step, module, u),
                }
                times = timed_by_turns(contestants, replace(settings.turns, seconds=3, fewest=3))
                with torch.no_grad():
                    forward = timed_by_turns({"f": partial(module, u)}, replace(settings.turns, seconds=2, fewest=3))
                row = {
                    **asdict(shape),
                    "gradient": gradient,
                    "steps": steps,
                    "milliseconds": times.json(),
                    "forward milliseconds": forward.spread("f").median,
                    "peak MiB": peak_bytes(partial(training_step, module, u)) / 2**20,
                }
                results.append(row)
                print(f"  steps {row}", flush=True)
    return results


def measure_several(settings: Settings) -> list[dict[str, Any]]:
    """Time a training step of several heads together, and one after another."""
    return [measure_together(shape, settings) for shape in settings.several]


def measure_together(shape: Shape, settings: Settings) -> dict[str, Any]:
    """Time a training step of several heads of one size."""
    count, u = settings.heads, tokens(shape, settings.seed)
    options = {"tol": settings.tol, "grad_tol": settings.tol}
    torch.manual_seed(settings.seed)
    together = IDLAttention(shape.n_embd, count, shape.time, head_size=shape.head_size, **options)
    apart = Several([head(shape, settings, "softmax") for _ in range(count)], shape.head_size, shape.n_embd)
    explicit = Several(
        [ExplicitHead(shape.head_size, shape.n_embd) for _ in range(count)], shape.head_size, shape.n_embd
    )
    modules = {"together": together, "one by one": apart, "explicit, one by one": explicit}
    times = timed_by_turns(
        {name: partial(training_step, module, u) for name, module in modules.items()}, settings.turns
    )
    row = {
        **asdict(shape),
        "heads": count,
        "milliseconds": times.json(),
        "one by one / together": times.ratio("one by one", "together").median,
    }
    print(f"  several {row}", flush=True)
    return row


def run(settings: Settings) -> dict[str, Any]:
    """Measure everything."""
    sections = {"heads": measure_heads, "steps": measure_steps, "several": measure_several}
    results: dict[str, Any] = {name: [] for name in sections}
    for threads in settings.threads:
        torch.set_num_threads(threads)
        for name, measure in sections.items():
            results[name] += [{"threads": threads, **row} for row in measure(settings)]
    return results


def markdown(results: dict[str, Any], described: dict[str, Any]) -> str:
    """Return the tables."""
    packages = ", ".join(f"{name} {version}" for name, version in described["packages"].items())
    lines = [
        "# Attention",
        "",
        f"{described['cpu']}, {described['cores']} cores, Python {described['python']};",
        f"{packages}; {described['time']}. Medians, in ms.",
    ]
    for threads in dict.fromkeys(row["threads"] for row in results["heads"]):
        of_threads = {name: [row for row in rows if row["threads"] == threads] for name, rows in results.items()}
        lines += ["", f"## {threads} thread{'s' if threads > 1 else ''}", "", "Training step of a head, converged:", ""]
        names = ("softmax", "lipschitz", "rank 4")
        lines += [f"| batch, time, n_embd, head | explicit | {' | '.join(f'{n} (steps, ratio)' for n in names)} |"]
        lines += ["|---|" + "---:|" * 4]
        for row in of_threads["heads"]:
            cells = (
                f"{row['milliseconds'][name]['median']:.1f} ({row['steps'][name]}, {row['times explicit'][name]:.1f})"
                for name in names
            )
            lines.append(f"| {sizes(row)} | {row['milliseconds']['explicit']['median']:.1f} | {' | '.join(cells)} |")
        lines += ["", "Softmax at a fixed number of steps:", ""]
        lines += [
            "| batch, time, n_embd, head | gradient | steps | forward | step | peak MiB |",
            "|---|---|" + "---:|" * 4,
        ]
        for row in of_threads["steps"]:
            step = row["milliseconds"][row["gradient"]]["median"]
            cells = (row["gradient"], row["steps"], f"{row['forward milliseconds']:.1f}", f"{step:.1f}")
            lines.append(f"| {sizes(row)} | {' | '.join(map(str, cells))} | {row['peak MiB']:.0f} |")
        for row in of_threads["several"]:
            median = {name: spread["median"] for name, spread in row["milliseconds"].items()}
            lines += [
                "",
                f"{row['heads']} heads at {sizes(row)}: together {median['together']:.1f}, one by one "
                f"{median['one by one']:.1f} ({row['one by one / together']:.1f} times), explicit one by one "
                f"{median['explicit, one by one']:.1f}.",
            ]
    return "\n".join(lines) + "\n"


def sizes(row: dict[str, Any]) -> str:
    """Return the sizes of a row."""
    return ", ".join(str(row[name]) for name in ("batch", "time", "n_embd", "head_size"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the files, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="toy size, files named attention_smoke.*")
    parser.add_argument("--threads", type=int, nargs="+", default=list(Settings.threads), metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    settings = replace(Settings(), threads=tuple(options.threads))
    settings = settings.smoke() if options.smoke else settings
    results = run(settings)
    described = environment(("torch", "implicit-deep-learning"))
    text = markdown(results, described)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("attention_smoke" if options.smoke else "attention")
    content = {"environment": described, "settings": asdict(settings), **results}
    path.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    path.with_suffix(".md").write_text(text)
    print(f"\n{text}\nWritten: {path}.json, .md")


if __name__ == "__main__":
    main()
