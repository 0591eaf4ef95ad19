"""The command `idl`: what a newcomer runs first. Everything that it prints, it prints here.

How a model is trained and what a run leaves behind is the business of `idl.training`.
"""

import importlib.util
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    import typer
    from rich.console import Console
    from rich.table import Table

    from idl import ImplicitModel
    from idl.training import EquilibriumReport, ExplicitMLP, History, Labelled, RunFolder

_EXTRAS = ("matplotlib", "rich", "safetensors", "sklearn", "typer")


@dataclass(frozen=True)
class DemoSettings:
    """Everything that decides the numbers of a demo; written to its run folder."""

    epochs: int
    seed: int
    command: str = "idl demo"
    dataset: str = "digits"
    hidden_dim: int = 64
    batch_size: int = 128
    max_learning_rate: float = 5e-3
    sim_lam: float = 1e-2


def main() -> None:
    """Run the command line, or say which packages it needs and exit with code 1."""
    missing = [name for name in _EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join("scikit-learn" if name == "sklearn" else name for name in missing)
        sys.exit(f"The command idl needs {names}: pip install 'implicit-deep-learning[demo]'")
    application()()


def application() -> "typer.Typer":
    """Return the command line, built when it is asked for, so that importing this module imports no extra."""
    import typer

    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_show_locals=False)

    @app.callback()
    def idl() -> None:
        """Implicit deep learning: models whose hidden state solves x = phi(A x + B u)."""

    @app.command()
    def demo(
        epochs: Annotated[int, typer.Option(min=1, help="Passes over the training data.")] = 60,
        seed: Annotated[
            int, typer.Option(min=0, max=2**32 - 1, help="Decides initial weights and order of samples.")
        ] = 0,
        out: Annotated[Path, typer.Option(help="Run folder; replaces a finished demo.")] = Path("runs/demo"),
    ) -> None:
        """Train an implicit model on handwritten digits, and an explicit network of the same size."""
        from rich.console import Console

        try:
            run_demo(DemoSettings(epochs, seed), out, Console())
        except KeyboardInterrupt:
            program = [sys.argv[0]] if Path(sys.argv[0]).name == "idl" else ["python", "-m", "idl"]
            command = shlex.join([*program, "demo", f"--epochs={epochs}", f"--seed={seed}", f"--out={out}"])
            typer.echo(f"Interrupted. To continue where it stopped: {command}", err=True)
            raise typer.Exit(130) from None
        except (OSError, ValueError) as error:  # a folder or a checkpoint that cannot be used
            typer.echo(error, err=True)
            raise typer.Exit(1) from None

    return app


def run_demo(settings: DemoSettings, out: Path, console: "Console") -> None:
    """Train both models, fill the run folder and print the table.

    Args:
        settings: What to train and how.
        out: Run folder. An interrupted demo with the same settings in it is continued, any other is replaced.
        console: Where progress and table go.

    Raises:
        FileExistsError: If ``out`` is a file or holds files that no run wrote.
        CheckpointError: If the checkpoint of an interrupted demo is damaged.
        KeyboardInterrupt: If Ctrl-C ended the training; what was trained so far is saved.
    """
    import torch

    import idl.data
    from idl import ImplicitModel
    from idl.training import ExplicitMLP, Labelled, RunFolder, report_equilibrium, save_weights

    folder = RunFolder.open(out)
    checkpoints = {name: folder.path / f"{name}.checkpoint.safetensors" for name in ("implicit", "explicit")}
    if folder.metrics() is not None or folder.settings() != asdict(settings):
        for path in checkpoints.values():
            path.unlink(missing_ok=True)
    elif any(path.exists() for path in checkpoints.values()):
        console.print(f"Continuing the interrupted demo in {folder.path}")

    digits = idl.data.load(settings.dataset)
    train = Labelled(digits.train_images.flatten(1), digits.train_labels)
    test = Labelled(digits.test_images.flatten(1), digits.test_labels)
    input_dim, output_dim = train.inputs.shape[1], len(digits.classes)
    torch.manual_seed(settings.seed)
    implicit = ImplicitModel(settings.hidden_dim, input_dim, output_dim)
    explicit = ExplicitMLP(input_dim, settings.hidden_dim, output_dim)
    models: dict[str, ImplicitModel | ExplicitMLP] = {"implicit": implicit, "explicit": explicit}

    folder.start(asdict(settings))
    histories = {}
    for name, model in models.items():
        histories[name] = _train(name, model, train, test, settings, checkpoints[name], console)
        save_weights(folder.path / f"{name}.safetensors", model)

    sparse = _make_sparse(explicit, train, test, settings, folder)
    report = report_equilibrium(implicit, test.inputs)
    _draw(implicit, test, histories, report, folder)
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    folder.finish(
        {name: {"parameters": parameters[name], **history.to_json()} for name, history in histories.items()}
        | {"equilibrium": report._asdict(), "sim": asdict(sparse)}
    )
    for path in checkpoints.values():
        path.unlink()
    console.print(_table(histories, parameters, report))
    console.print(
        f"SIM makes the explicit MLP a sparse implicit model: {100 * sparse.test_accuracy:.2f} % right with\n"
        f"{100 * sparse.weights_kept:.1f} % of its weights, every row within {sparse.gap:.0e} of the optimum, "
        f"{sparse.seconds:.1f} s."
    )
    console.print(f"Weights, settings, metrics and pictures are in {folder.path}", soft_wrap=True)


@dataclass(frozen=True)
class SparseResult:
    """What state-driven training made of the explicit network."""

    test_accuracy: float
    weights_kept: float
    """Non-zeros of A, B, C and D over the weights of the explicit network."""
    gap: float
    """Largest relative duality gap of a row."""
    norm: float
    seconds: float


def _make_sparse(
    teacher: "ExplicitMLP", train: "Labelled", test: "Labelled", settings: DemoSettings, folder: "RunFolder"
) -> SparseResult:
    """Turn the explicit network into a sparse implicit model, and save it with a picture of its weights."""
    import torch

    from idl import SIM
    from idl.training import draw_sparsity, save_weights

    start = time.perf_counter()
    sim = SIM(lam=settings.sim_lam).fit(teacher, [train.inputs])
    seconds = time.perf_counter() - start
    model, certificate = sim.model_, sim.certificate_
    save_weights(folder.path / "sim.safetensors", model)
    kept = certificate.weights_kept
    title = f"State-driven model: {kept.total:,} weights, {100 * kept.fraction:.1f} % of the explicit network's"
    D = model.get_parameter("D")
    draw_sparsity(model.A, model.B, model.C, D, folder.path / "sparsity.png", title=title)
    gap = float(torch.cat((certificate.states.gap, certificate.outputs.gap)).max())
    norm = float(certificate.row_sums.max())
    return SparseResult(sim.score([(test.inputs, test.labels)]), kept.fraction, gap, norm, seconds)


def _train(
    name: str,
    model: "ImplicitModel | ExplicitMLP",
    train: "Labelled",
    test: "Labelled",
    settings: DemoSettings,
    checkpoint: Path,
    console: "Console",
) -> "History":
    """Train one of the two models under a progress bar."""
    from idl.training import Recipe, fit_supervised, progress_line, stop_on_interrupt

    recipe = Recipe(settings.epochs, settings.batch_size, settings.max_learning_rate, settings.seed)
    with stop_on_interrupt() as should_stop, progress_line(f"{name} model", console) as show:
        return fit_supervised(
            model,
            train,
            test,
            recipe,
            checkpoint=checkpoint,
            settings={**asdict(settings), "model": name},
            on_progress=show,
            should_stop=should_stop,
        )


def _draw(
    model: "ImplicitModel",
    test: "Labelled",
    histories: "dict[str, History]",
    report: "EquilibriumReport",
    folder: "RunFolder",
) -> None:
    """Write the two pictures; the second shows plain iteration in float64 on one batch of test images."""
    import torch

    from idl.training import draw_equilibrium, draw_training, picard_residuals

    names = {"implicit": "implicit model", "explicit": "explicit MLP"}
    records = {names[name]: history.epochs for name, history in histories.items()}
    draw_training(records, folder.path / "training.png")
    A = model.state_matrix().detach().double()
    bu = test.inputs[:256].double() @ model.B.detach().double().T
    residuals = picard_residuals(lambda x: torch.relu(x @ A.T + bu), torch.zeros_like(bu), tol=1e-9, max_steps=200)
    draw_equilibrium(residuals, A, folder.path / "equilibrium.png", rate=report.norm)


def _table(histories: "dict[str, History]", parameters: dict[str, int], report: "EquilibriumReport") -> "Table":
    """Return the closing table, which fits 80 columns."""
    from rich.table import Table

    table = Table("", "implicit model", "explicit MLP")
    for column in table.columns[1:]:
        column.justify = "right"
    accuracies = [f"{100 * history.test_accuracy:.2f} %" for history in histories.values()]
    table.add_row("test accuracy", *accuracies)
    table.add_row("parameters", *(f"{count:,}" for count in parameters.values()))
    table.add_row("training time", *(f"{history.seconds:.1f} s" for history in histories.values()))
    table.add_row("equilibrium steps, median (max)", f"{report.steps_median:g} ({report.steps_max})", "-")
    table.add_row("equilibrium residual, max", f"{report.residual_max:.1e}", "-")
    table.add_row("||A||_inf, largest row sum of |A|", f"{report.norm:.4f}", "-")
    return table
