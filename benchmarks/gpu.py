"""Measure all models on a GPU, beside the peers and explicit layers.

    make bench-gpu                                # all of it, about two minutes
    make bench-gpu ARGS="--smoke --device cpu"    # every section at toy size, without a GPU: does it run?

Writes gpu.json and .md to the folder of --out. Nothing here passes or fails.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import attention
import contestants
import implicit_rnn
import instances
import torch
from contestants import Solve
from measuring import Times, Turns, environment, timed_by_turns
from torch import Tensor, nn
from torch.nn import functional as F

from idl import IDLAttention, ImplicitRNN

Step = Callable[[], Any]


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is measured."""

    device: str = "cuda"
    seed: int = 0
    solve: Solve = Solve()  # noqa: RUF009, immutable as what follows
    # Training steps of ImplicitModel: (input, hidden, batch), each with A of row sums .8 and with six times that.
    training_sizes: tuple[tuple[int, int, int], ...] = ((784, 100, 128), (784, 1000, 128), (3072, 2000, 1024))
    row_sum: float = 0.8
    scales: tuple[float, ...] = (1.0, 6.0)
    # Hard equilibria, forward only; kappa is above the row sums, so that the constraint does nothing.
    hard_size: tuple[int, int, int] = (784, 400, 1024)
    hard_solve: Solve = Solve(kappa=0.9999)  # noqa: RUF009
    recurrent: tuple[implicit_rnn.Shape, ...] = (
        implicit_rnn.Shape(100, 60, 22, 20, 2),
        implicit_rnn.Shape(100, 60, 128, 64),
        implicit_rnn.Shape(64, 256, 128, 128),
    )
    # Parallel in time: (batch, time, states).
    long: tuple[tuple[int, int, int], ...] = ((1, 1000, 16), (16, 1000, 16), (1, 4000, 16))
    long_turns: Turns = Turns(seconds=0, fewest=3, most=3, warm=0, timed=1)  # noqa: RUF009
    # Attention: batch, time, n_embd and the size of a head, of which there are n_embd / head_size.
    heads: tuple[attention.Shape, ...] = (
        attention.Shape(8, 256, 384, 192),
        attention.Shape(8, 256, 384, 32),
        attention.Shape(32, 512, 768, 64),
    )
    tol: float = 1e-5
    turns: Turns = Turns(seconds=3, fewest=3, most=50, warm=1, timed=3)  # noqa: RUF009

    def smoke(self) -> "Settings":
        """Return the same at toy size."""
        return replace(
            self,
            training_sizes=((24, 40, 16),),
            hard_size=(24, 50, 16),
            recurrent=(implicit_rnn.Shape(4, 5, 6, 5, 2),),
            long=((2, 10, 4),),
            heads=(attention.Shape(2, 8, 16, 4),),
            turns=Turns(seconds=0, fewest=2, most=2, warm=0, timed=1),
        )


class ExplicitAttention(nn.Module):
    """Explicit causal attention of all heads, by torch's kernel."""

    def __init__(self, heads: int, n_embd: int) -> None:
        super().__init__()
        self.heads = heads
        self.maps, self.projection = nn.Linear(n_embd, 3 * n_embd, bias=False), nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """Return ``(batch, time, n_embd)``."""
        q, k, v = self.maps(u).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        outputs: Tensor = self.projection(read.transpose(1, 2).flatten(2))
        return outputs


def measured(steps: dict[str, Step], settings: Settings) -> tuple[Times, dict[str, float]]:
    """Return the times and the peak memory in MiB of each step, waiting for the device at its end."""
    on_gpu = torch.device(settings.device).type == "cuda"

    def whole(step: Step) -> None:
        step()
        if on_gpu:
            torch.cuda.synchronize()

    peaks = {}
    for name, step in steps.items():
        whole(step)
        if on_gpu:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            whole(step)
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return timed_by_turns({name: partial(whole, step) for name, step in steps.items()}, settings.turns), peaks


def row(problem: str, steps: dict[str, Step], settings: Settings, **more: Any) -> dict[str, Any]:
    """Measure the steps of a problem."""
    times, peaks = measured(steps, settings)
    print(f"  {problem}: " + ", ".join(f"{name} {times.spread(name).median:.2f} ms" for name in steps), flush=True)
    return {"problem": problem, "milliseconds": times.json(), "peak MiB": peaks, **more}


def measure_training(settings: Settings) -> list[dict[str, Any]]:
    """Time training steps of ImplicitModel."""
    rows = []
    for inputs, hidden, batch in settings.training_sizes:
        for scale in settings.scales:
            torch.manual_seed(settings.seed)
            matrices = instances.random_model(hidden, inputs, 10, settings.row_sum)
            matrices["A"] *= scale
            u, labels = (t.to(settings.device) for t in instances.random_batch(inputs, batch, 10))
            models = contestants.training_models(matrices, settings.solve)
            models = {name: model.to(settings.device) for name, model in models.items()}
            steps = {name: contestants.training_step(model, u, labels) for name, model in models.items()}
            with torch.no_grad():
                taken = int(models["ours"](u, return_solution=True)[1].steps.max())
            name = f"{inputs}/{hidden}/{batch}, {min(settings.row_sum * scale, settings.solve.kappa)}"
            rows.append(row(name, steps, settings, our_steps=taken))
    return rows


def measure_hard(settings: Settings) -> list[dict[str, Any]]:
    """Time the search for stiff equilibria; with the error of each against one in float64."""
    inputs, hidden, batch = settings.hard_size
    rows = []
    for name, entries, total in (
        ("positive, rows .99", instances.positive, 0.99),
        ("positive, rows .999", instances.positive, 0.999),
        ("5 blocks, rows .999", instances.blocks, 0.999),
    ):
        torch.manual_seed(settings.seed)
        A = instances.with_row_sums(total)(entries(hidden))
        B = torch.randn(hidden, inputs) / inputs**0.5
        B *= B.sum().sign()
        u, _ = instances.random_batch(inputs, batch, 10)
        A, B, u = (t.to(settings.device) for t in (A, B, u))
        exact = contestants.state_solvers(
            A.double(), B.double(), u.double(), replace(settings.hard_solve, tolerance=1e-10), constrained=True
        )["ours"]()
        solvers = contestants.state_solvers(A, B, u, settings.hard_solve, constrained=True)
        with torch.no_grad():
            errors = {name: instances.relative_error(solver(), exact) for name, solver in solvers.items()}
            rows.append(row(f"{name}, {inputs}/{hidden}/{batch}", solvers, settings, errors=errors))
    return rows


def measure_recurrent(settings: Settings) -> list[dict[str, Any]]:
    """Time training steps of ImplicitRNN."""
    rows = []
    for shape in settings.recurrent:
        models = implicit_rnn.contestants(shape, settings.seed)
        generator = torch.Generator().manual_seed(settings.seed)
        sequences = torch.randn(shape.batch, shape.time, 1, generator=generator).to(settings.device)
        targets = torch.randn(shape.batch, 1, generator=generator).to(settings.device)
        steps = {
            name: partial(implicit_rnn.training_step, model.to(settings.device), sequences, targets)
            for name, model in models.items()
        }
        rows.append(row(implicit_rnn.described_shape(asdict(shape)), steps, settings))
    return rows


def measure_long(settings: Settings) -> list[dict[str, Any]]:
    """Time training steps on long sequences, one time after another and all times together."""
    rows = []
    for batch, time, n in settings.long:
        generator = torch.Generator().manual_seed(settings.seed)
        sequences = torch.randn(batch, time, 1, generator=generator).to(settings.device)
        targets = torch.randn(batch, 1, generator=generator).to(settings.device)
        steps: dict[str, Step] = {}
        for name, parallel in {"one by one": False, "together": True}.items():
            torch.manual_seed(settings.seed)
            model = ImplicitRNN(1, 1, n, n, activation="tanh", parallel_in_time=parallel).to(settings.device)
            steps[name] = partial(implicit_rnn.training_step, model, sequences, targets)
        rows.append(row(f"{batch}, {time}, {n}, {n}", steps, replace(settings, turns=settings.long_turns)))
    return rows


def measure_attention(settings: Settings) -> list[dict[str, Any]]:
    """Time training steps of attention, all heads in one module."""
    rows = []
    for shape in settings.heads:
        heads = shape.n_embd // shape.head_size
        u = attention.tokens(shape, settings.seed).to(settings.device)
        options = {"tol": settings.tol, "grad_tol": settings.tol}
        torch.manual_seed(settings.seed)
        softmax = IDLAttention(shape.n_embd, heads, shape.time, **options)
        lipschitz = IDLAttention(shape.n_embd, heads, shape.time, attention_version="lipschitz", **options)
        modules = {"explicit": ExplicitAttention(heads, shape.n_embd), "softmax": softmax, "lipschitz": lipschitz}
        modules = {name: module.to(settings.device) for name, module in modules.items()}
        steps: dict[str, Step] = {name: partial(attention.training_step, module, u) for name, module in modules.items()}
        with torch.no_grad():
            taken = int(softmax(u, return_solution=True)[1].steps.max())
        name = f"{shape.batch}, {shape.time}, {shape.n_embd}, {heads} x {shape.head_size}"
        rows.append(row(name, steps, settings, our_steps=taken))
    return rows


SECTIONS = {
    "ImplicitModel, training step; input/hidden/batch, row sum": measure_training,
    "Hard equilibria, forward": measure_hard,
    "ImplicitRNN, training step; batch, time, hidden, implicit, rank": measure_recurrent,
    "ImplicitRNN, parallel in time, training step; batch, time, hidden, implicit": measure_long,
    "IDLAttention, training step; batch, time, n_embd, heads": measure_attention,
}


def table(title: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a section: medians in ms, with the error or the peak memory in brackets."""
    names = list(rows[0]["milliseconds"])
    lines = ["", f"## {title}", "", f"| | {' | '.join(names)} | steps of ours |", "|---|" + "---:|" * (len(names) + 1)]
    for entry in rows:
        notes = {name: f" ({error:.0e})" for name, error in entry.get("errors", {}).items()}
        notes |= {name: f" ({peak:,.1f} MiB)" for name, peak in entry["peak MiB"].items() if name not in notes}
        cells = (f"{entry['milliseconds'][name]['median']:.2f}{notes.get(name, '')}" for name in names)
        lines.append(f"| {entry['problem']} | {' | '.join(cells)} | {entry.get('our_steps', '')} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the files, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="toy size, files named gpu_smoke.*")
    parser.add_argument("--device", default=Settings.device)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    settings = Settings(device=options.device)
    settings = settings.smoke() if options.smoke else settings
    warnings.simplefilter("ignore")  # of peers, and of solves that do not converge: their errors are in the tables
    on_gpu = torch.device(settings.device).type == "cuda"
    card = torch.cuda.get_device_name(settings.device) if on_gpu else "no GPU"
    described = {"card": card, **environment(("torch", "implicit-deep-learning", "torchidl", "torchdeq"))}
    packages = ", ".join(f"{name} {version}" for name, version in described["packages"].items())
    lines = ["# On a GPU", "", f"{card}, Python {described['python']}; {packages};", f"{described['time']}."]
    lines += ["Medians in ms; in brackets the relative error, or the peak memory beyond what was held before."]
    results = {}
    for title, measure in SECTIONS.items():
        results[title] = measure(settings)
        lines += table(title, results[title])
    text = "\n".join(lines) + "\n"
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("gpu_smoke" if options.smoke else "gpu")
    content = {"environment": described, "settings": asdict(settings), "results": results}
    path.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    path.with_suffix(".md").write_text(text)
    print(f"\n{text}\nWritten: {path}.json, .md")


if __name__ == "__main__":
    main()
