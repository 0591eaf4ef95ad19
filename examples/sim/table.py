"""Measure the tables of README.md: SIM beside pruning, under attack, with few samples, from a small CNN.

    python examples/sim/table.py

Each finished measurement is written to runs/sim-table/results.json, so that the command can be stopped and given again.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import pruning
import torch
import typer
from attacks import fgsm, pgd
from rich.console import Console
from torch import nn
from train import Dataset, Settings, Splits, accuracy, load_splits, train_teacher

from idl import SIM
from idl.sim.solvers import Cardinality
from idl.training import RunFolder, draw_tradeoff, exit_with_advice, spread, write_json

SEEDS = (0, 1, 2)
KEPT = (0.05, 0.10, 0.15, 0.21, 0.34)
EPS = (0.01, 0.03, 0.1, 0.2)
SAMPLES = (500, 2000, 10_000, None)  # None is all
ATTACKED = 1000  # test images
LOSS = 0.01  # of accuracy that is accepted on the validation images
CLOSE, ROBUST, LAM = 0.15, 0.15, 1e-3

Result = dict[str, float]


@dataclass
class Ledger:
    """Results by name, each written as soon as it is there."""

    path: Path
    console: Console

    def __post_init__(self) -> None:
        """Read what was measured before."""
        self.results: dict[str, Result] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def measure(self, name: str, measurement: Callable[[], Result]) -> None:
        """Look a result up, or measure it and write all results."""
        if name not in self.results:
            with self.console.status(name):
                self.results[name] = measurement()
            write_json(self.path, self.results)
        shown = {key: round(value, 4) for key, value in self.results[name].items()}
        self.console.print(name, shown, soft_wrap=True)


def sim_by_keep(kept: float) -> SIM:
    """Return the SIM that keeps a part of the teacher's weights."""
    return SIM(Cardinality(keep=kept), refit="layers")


def judged(network: nn.Module, weights: int, splits: Splits, seconds: float) -> Result:
    """Return what is known of a network."""
    return {
        "validation": accuracy(network, splits.validation),
        "test": accuracy(network, splits.test),
        "weights": weights,
        "seconds": seconds,
    }


def compare(ledger: Ledger, name: str, teacher: nn.Module, splits: Splits, seed: int) -> None:
    """Measure accuracy against weights kept, (a)."""
    inputs = splits.train.inputs
    batches = inputs.split(2000)
    prunings: dict[str, Callable[[float], nn.Module]] = {
        "global magnitude": lambda kept: pruning.magnitude_pruned(teacher, kept, everywhere=True),
        "layerwise magnitude": lambda kept: pruning.magnitude_pruned(teacher, kept, everywhere=False),
        "activation-weighted, refitted": lambda kept: pruning.refitted_after_pruning(teacher, inputs, kept),
        "layerwise Lasso, refitted": lambda kept: pruning.layerwise_lasso(teacher, inputs, kept),
    }
    tuned = ("global magnitude", "layerwise magnitude", "activation-weighted, refitted")
    sims: dict[str, Callable[[float], SIM]] = {
        "SIM, l1": lambda kept: SIM(lam=0.01).fit(teacher, batches, target_sparsity=1 - kept),
        "SIM, cardinality": lambda kept: sim_by_keep(kept).fit(teacher, batches),
    }

    def tune(network: nn.Module) -> nn.Module:
        return pruning.fine_tuned(network, splits.train, splits.validation, seed)

    def pruned(prune: Callable[[float], nn.Module], kept: float, tuning: bool = False) -> Result:
        start = time.perf_counter()
        network = tune(prune(kept)) if tuning else prune(kept)
        seconds = time.perf_counter() - start
        return judged(network, pruning.weights_kept(network), splits, seconds)

    def modelled(fit: Callable[[float], SIM], kept: float, tuning: bool = False) -> Result:
        start = time.perf_counter()
        sim = fit(kept)
        model = tune(sim.model_) if tuning else sim.model_
        return judged(model, sim.certificate_.weights_kept.total, splits, time.perf_counter() - start)

    for kept in KEPT:
        for method, prune in prunings.items():
            ledger.measure(f"{name}/{method}/{kept}", partial(pruned, prune, kept))
            if method in tuned:
                ledger.measure(f"{name}/{method}, tuned/{kept}", partial(pruned, prune, kept, tuning=True))
        for method, fit in sims.items():
            ledger.measure(f"{name}/{method}/{kept}", partial(modelled, fit, kept))
        last = "SIM, cardinality"
        ledger.measure(f"{name}/{last}, tuned/{kept}", partial(modelled, sims[last], kept, tuning=True))


def attack(ledger: Ledger, name: str, teacher: nn.Module, splits: Splits, seed: int) -> None:
    """Measure accuracy under attack, (b)."""
    images, labels = splits.test.inputs[:ATTACKED], splits.test.labels[:ATTACKED]
    models: dict[str, Callable[[], nn.Module]] = {
        "teacher": lambda: teacher,
        "global magnitude, tuned": lambda: pruning.fine_tuned(
            pruning.magnitude_pruned(teacher, ROBUST, everywhere=True), splits.train, splits.validation, seed
        ),
        "activation-weighted, refitted": lambda: pruning.refitted_after_pruning(teacher, splits.train.inputs, ROBUST),
        "SIM, l1": lambda: SIM(lam=LAM).fit(teacher, splits.train.inputs.split(2000)).model_,
        "SIM, cardinality": lambda: sim_by_keep(ROBUST).fit(teacher, splits.train.inputs.split(2000)).model_,
    }

    def under_attack(make: Callable[[], nn.Module]) -> Result:
        model = make()
        result = {"clean": right(model, images)}
        for eps in EPS:
            result[f"FGSM {eps}"] = right(model, fgsm(model, images, labels, eps))
            result[f"PGD {eps}"] = right(model, pgd(model, images, labels, eps, seed))
        return result

    def right(model: nn.Module, attacked: torch.Tensor) -> float:
        with torch.no_grad():
            return float((model(attacked).argmax(1) == labels).double().mean())

    for method, make in models.items():
        ledger.measure(f"{name}/attacked/{method}", partial(under_attack, make))


def count_samples(ledger: Ledger, name: str, teacher: nn.Module, splits: Splits) -> None:
    """Measure how many samples SIM needs, (c)."""
    settings: dict[str, Callable[[], SIM]] = {
        "SIM, l1": lambda: SIM(lam=LAM),
        "SIM, cardinality": lambda: sim_by_keep(CLOSE),
    }

    def fitted(sim: SIM, samples: int | None) -> Result:
        start = time.perf_counter()
        sim.fit(teacher, splits.train.inputs[:samples].split(2000))
        kept = sim.certificate_.weights_kept.total
        return judged(sim.model_, kept, splits, time.perf_counter() - start)

    for method, make in settings.items():
        for samples in SAMPLES:
            ledger.measure(f"{name}/{samples or 'all'} samples/{method}", partial(fitted, make(), samples))


def convolutional(ledger: Ledger, name: str, teacher: nn.Module, splits: Splits) -> None:
    """Measure SIM of a small CNN, (d): its convolutions become matrices, whose weights are not shared."""
    batches = splits.train.inputs.split(2000)
    settings = {"SIM, l1": SIM(lam=LAM), "SIM, 10,000 weights": SIM(Cardinality(keep=10_000), refit="layers")}

    def fitted(sim: SIM) -> Result:
        start = time.perf_counter()
        sim.fit(teacher, batches)
        kept = sim.certificate_.weights_kept
        seconds = time.perf_counter() - start
        return judged(sim.model_, kept.total, splits, seconds) | {"teacher weights": kept.teacher}

    ledger.measure(f"{name}/teacher", lambda: judged(teacher, sum(p.numel() for p in teacher.parameters()), splits, 0))
    for method, sim in settings.items():
        ledger.measure(f"{name}/{method}", partial(fitted, sim))


def main(
    dataset: Annotated[Dataset, typer.Option(help="Images to classify.")] = Dataset.fashion_mnist,
    smoke: Annotated[bool, typer.Option("--smoke", help="One seed and 512 images, to show that all works.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of results, teachers and pictures.")] = Path("runs/sim-table"),
) -> None:
    """Measure what is missing, print the tables as Markdown and draw accuracy against weights."""
    console = Console(stderr=True)  # so that the tables alone can be sent to a file
    seeds = SEEDS[:1] if smoke else SEEDS
    with exit_with_advice():
        folder, images = RunFolder.open(out), {"dataset": dataset.value, "smoke": smoke}
        folder.finished(images)  # refuses results of other ones
        folder.start(images)
        ledger = Ledger(out / "results.json", console)
        splits = load_splits(dataset.value, 512 if smoke else None)
        for seed in seeds:
            settings = Settings(dataset.value, seed=seed, training_images=512 if smoke else None)
            teacher = trained(settings, splits, out, console)
            weights = pruning.weights_kept(teacher)
            ledger.measure(f"mlp{seed}/teacher", partial(judged, teacher, weights, splits, 0))
            compare(ledger, f"mlp{seed}", teacher, splits, seed)
            attack(ledger, f"mlp{seed}", teacher, splits, seed)
            count_samples(ledger, f"mlp{seed}", teacher, splits)
            cnn = Settings(dataset.value, "cnn", seed=seed, training_images=512 if smoke else None)
            convolutional(ledger, f"cnn{seed}", trained(cnn, splits, out, console), splits)
    typer.echo(tables(ledger.results, seeds, dataset.value))
    draw(ledger.results, seeds, out / "accuracy.png")


def trained(settings: Settings, splits: Splits, out: Path, console: Console) -> nn.Module:
    """Return a teacher, trained once: its last checkpoint stays."""
    return train_teacher(settings, splits, out / f"{settings.teacher}{settings.seed}.safetensors", console)


METHODS = (
    "global magnitude",
    "global magnitude, tuned",
    "layerwise magnitude",
    "layerwise magnitude, tuned",
    "activation-weighted, refitted",
    "activation-weighted, refitted, tuned",
    "layerwise Lasso, refitted",
    "SIM, l1",
    "SIM, cardinality",
    "SIM, cardinality, tuned",
)


def tables(results: dict[str, Result], seeds: Sequence[int], dataset: str) -> str:
    """Return all tables as Markdown."""

    def over_seeds(name: str, key: str, scale: float = 100) -> list[float]:
        return [scale * results[name.format(seed)][key] for seed in seeds]

    teacher = over_seeds("mlp{}/teacher", "test")
    lines = [
        f"(a) {dataset}, {len(seeds)} teachers, {spread(teacher)} %; test accuracy in %, by weights kept",
        "",
        "| method | " + " | ".join(f"{100 * kept:g} %" for kept in KEPT) + " | chosen on validation | s |",
        "|---|" + "---|" * (len(KEPT) + 2),
    ]
    for method in METHODS:
        cells = [spread(over_seeds(f"mlp{{}}/{method}/{kept}", "test")) for kept in KEPT]
        seconds = statistics.mean(over_seeds(f"mlp{{}}/{method}/{CLOSE}", "seconds", 1))
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {chosen(results, seeds, method)} | {seconds:.1f} |")
    lines += ["", f"(b) accuracy in % of {ATTACKED} test images under attack", ""]
    attacks = ["clean", *(f"{kind} {eps}" for kind in ("FGSM", "PGD") for eps in EPS)]
    lines += ["| model | " + " | ".join(attacks) + " |", "|---|" + "---|" * len(attacks)]
    for method in (
        "teacher",
        "global magnitude, tuned",
        "activation-weighted, refitted",
        "SIM, l1",
        "SIM, cardinality",
    ):
        means = [statistics.mean(over_seeds(f"mlp{{}}/attacked/{method}", key)) for key in attacks]
        lines.append(f"| {method} | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")
    lines += ["", "(c) test accuracy in % by the number of samples that SIM sees", ""]
    lines += ["| method | " + " | ".join(f"{m or 'all'}" for m in SAMPLES) + " |", "|---|" + "---|" * len(SAMPLES)]
    for method in ("SIM, l1", "SIM, cardinality"):
        cells = [spread(over_seeds(f"mlp{{}}/{m or 'all'} samples/{method}", "test")) for m in SAMPLES]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += ["", "(d) a small CNN", "", "| model | test accuracy in % | weights | s |", "|---|---|---|---|"]
    for method in ("teacher", "SIM, l1", "SIM, 10,000 weights"):
        cell = spread(over_seeds(f"cnn{{}}/{method}", "test"))
        weights = statistics.mean(over_seeds(f"cnn{{}}/{method}", "weights", 1))
        seconds = statistics.mean(over_seeds(f"cnn{{}}/{method}", "seconds", 1))
        lines.append(f"| {method} | {cell} | {weights:,.0f} | {seconds:.1f} |")
    return "\n".join(lines)


def chosen(results: dict[str, Result], seeds: Sequence[int], method: str) -> str:
    """Say what the smallest network costs on the test images whose validation accuracy is close to the teacher's."""
    parts, losses = [], []
    for seed in seeds:
        teacher = results[f"mlp{seed}/teacher"]
        close = [
            kept for kept in KEPT if results[f"mlp{seed}/{method}/{kept}"]["validation"] >= teacher["validation"] - LOSS
        ]
        if not close:
            return "none"
        parts.append(close[0])
        losses.append(100 * (teacher["test"] - results[f"mlp{seed}/{method}/{close[0]}"]["test"]))
    kept = ", ".join(f"{100 * part:g}" for part in parts)
    return f"{kept} %: {statistics.mean(losses):.2f} points lost"


def draw(results: dict[str, Result], seeds: Sequence[int], path: Path) -> None:
    """Draw accuracy against weights kept, means over the seeds."""
    curves = {
        method: [
            (100 * kept, 100 * statistics.mean(results[f"mlp{seed}/{method}/{kept}"]["test"] for seed in seeds))
            for kept in KEPT
        ]
        for method in METHODS
    }
    teacher = 100 * statistics.mean(results[f"mlp{seed}/teacher"]["test"] for seed in seeds)
    draw_tradeoff(curves, teacher, path)


if __name__ == "__main__":
    typer.run(main)
