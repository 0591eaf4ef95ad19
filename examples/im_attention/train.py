"""Train one language model on characters: a GPT with implicit attention, or one that it is compared with.

    python examples/im_attention/train.py                              # Python's help texts, implicit softmax
    python examples/im_attention/train.py --dataset tinyshakespeare --model lipschitz
    python examples/im_attention/train.py --model converted            # a trained explicit GPT, converted
    python examples/im_attention/train.py --smoke                      # seconds

Interrupted with Ctrl-C, the same command continues to the numbers of a run that was not.
"""

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import safetensors.torch
import torch
import typer
from language_models import FINE_TUNED, MODELS, NextCharacter, Shape, build, fine_tuned, parameters
from rich.console import Console

import idl.data
from idl.atomic import write_bytes
from idl.data import CharacterWindows
from idl.training import (
    Labelled,
    Recipe,
    Run,
    exit_with_advice,
    finished_run,
    usable_device,
)

_SAMPLED = 400  # characters of the sample


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run."""

    dataset: str = "topics"
    model: str = "softmax"
    n_embd: int = 128
    block_size: int = 64
    n_layer: int = 2
    n_head: int = 2
    dropout: float = 0.2
    epochs: int = 6
    batch_size: int = 32
    max_learning_rate: float = 3e-3
    fine_tuning_epochs: int = 3
    seed: int = 0
    device: str = "cpu"
    characters: int | None = None  # of the text; None is all of them

    def name(self) -> str:
        """Return the name of the run folder."""
        smoke = "-smoke" if self.characters else ""
        return f"{self.dataset}-{self.model}-{self.n_embd}-seed{self.seed}{smoke}"

    def shape(self) -> Shape:
        """Return the sizes of the model."""
        return Shape(self.n_embd, self.block_size, self.n_layer, self.n_head, self.dropout)


TEXTS = {"topics": idl.data.topics, "tinyshakespeare": idl.data.tinyshakespeare}
"""The data sets."""

Dataset = Enum("Dataset", {name: name for name in TEXTS}, type=str)  # type: ignore[misc]
Model = Enum("Model", {name: name for name in MODELS}, type=str)  # type: ignore[misc]


def train(settings: Settings, out: Path, console: Console, fresh: bool = False) -> dict[str, object]:
    """Train, or continue, or look up the run in folder `out`; return its metrics."""
    return finished_run(settings, out, console, lambda run: _trained(settings, run), fresh=fresh)


def _trained(settings: Settings, run: Run) -> dict[str, object]:
    # 1. Data and model. What is fine-tuned begins with an explicit model, which is trained now if it is not there yet.
    windows = idl.data.character_windows(TEXTS[settings.dataset]()[: settings.characters], settings.block_size)
    model = build(settings.model, len(windows.alphabet), settings.shape(), settings.seed)
    recipe = Recipe(settings.epochs, settings.batch_size, settings.max_learning_rate, settings.seed)
    if settings.model in FINE_TUNED:
        explicit = replace(settings, model="explicit")
        source = run.path.parent / explicit.name()
        train(explicit, source, run.console)
        model.load_state_dict(safetensors.torch.load_file(source / "weights.safetensors"))
        model = fine_tuned(settings.model, model)
        recipe = replace(recipe, epochs=settings.fine_tuning_epochs, max_learning_rate=settings.max_learning_rate / 3)

    model.to(settings.device)

    # 2. Training. The seed counts from here: building the models has drawn different numbers.
    torch.manual_seed(settings.seed)
    train_data = Labelled(windows.train_inputs, windows.train_targets)
    test_data = Labelled(windows.test_inputs, windows.test_targets)
    history = run.fit(settings.model, model, train_data, test_data, recipe)

    # 3. What is known of the model now.
    text = sample(model, windows, settings)
    write_bytes(run.path / "sample.txt", text.encode())
    run.console.print(text, style="dim", markup=False, highlight=False)
    loss = history.epochs[-1].test_loss
    run.console.print(f"Loss on the end of the text: {loss:.3f}; run folder {run.path}", soft_wrap=True)
    found = equilibria(model, windows.test_inputs[:100].to(settings.device))
    return {"parameters": parameters(model), "equilibria": found, **history.to_json()}


def sample(model: NextCharacter, windows: CharacterWindows, settings: Settings) -> str:
    """Return a text that the model goes on with after the beginning of the test part."""
    start = windows.test_inputs[:1, : windows.test_inputs.shape[1] // 2].to(settings.device)
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    drawn = model.gpt.generate(start, _SAMPLED, temperature=0.8, top_k=20, generator=generator)
    return windows.decoded(drawn[0].cpu())


def equilibria(model: NextCharacter, characters: torch.Tensor) -> dict[str, float] | None:
    """Return how many steps the equilibria of some windows take, and how many are found, over all layers."""
    solutions = []

    def note(attention: torch.nn.Module, arguments: tuple[torch.Tensor, ...], output: object) -> None:
        solutions.append(attention.outputs(arguments[0], return_solution=True)[1][0])

    model.eval()
    handles = [attention.register_forward_hook(note) for attention in model.attentions()]
    with torch.no_grad():
        model(characters)
    for handle in handles:
        handle.remove()
    if not solutions:
        return None
    return {
        "steps": float(torch.cat([solution.steps for solution in solutions]).double().mean()),
        "converged": float(torch.cat([solution.converged for solution in solutions]).double().mean()),
        "residual": float(torch.cat([solution.residual for solution in solutions]).max()),
    }


def main(
    dataset: Annotated[Dataset, typer.Option(help="Which text.")] = Dataset["topics"],  # type: ignore[valid-type]
    model: Annotated[Model, typer.Option(help="Which model.")] = Model["softmax"],  # type: ignore[valid-type]
    epochs: Annotated[
        int | None, typer.Option(min=1, help=f"Passes over the training data; {Settings.epochs} by default.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Decides weights, dropout, order of windows.")
    ] = Settings.seed,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.", callback=usable_device)] = Settings.device,
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny run that shows that all works.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again, whatever was trained.")] = False,
    out: Annotated[Path | None, typer.Option(help="Run folder; by default one below runs/im_attention.")] = None,
) -> None:
    """Train one language model on characters; an interrupted run continues."""
    settings = Settings(dataset=dataset.value, model=model.value, seed=seed, device=device)
    settings = tiny(settings) if smoke else settings
    settings = replace(settings, epochs=epochs or settings.epochs)
    with exit_with_advice():
        train(settings, out or Path("runs/im_attention") / settings.name(), Console(), fresh)


def tiny(settings: Settings) -> Settings:
    """Return settings that take seconds."""
    return replace(settings, n_embd=16, block_size=16, batch_size=16, epochs=2, fine_tuning_epochs=1, characters=4000)


if __name__ == "__main__":
    typer.run(main)
