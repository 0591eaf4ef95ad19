"""Supervised training, the same way for every model: the loop, its evaluation, its history.

What is to be predicted decides the loss: cross entropy for classes, the mean square of the error for numbers.

Printing, drawing and the choice of data are the caller's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from idl import checks
from idl.training.checkpoint import load_checkpoint, save_checkpoint
from idl.training.labelled import Labelled, check_alike, check_scores, checked, number_of_classes
from idl.training.runs import check_json
from idl.training.schedule import OneCycle

# An interruption writes a checkpoint anyway; this bounds what a killed process loses.
_SECONDS_BETWEEN_CHECKPOINTS = 10.0
_SECONDS_BETWEEN_REPORTS = 0.1
_EVALUATION_BATCH = 1000


class EpochRecord(NamedTuple):
    """Loss and accuracy of an epoch: on the training data while learning, on the test data at its end.

    Only classes have an accuracy; of numbers it is ``None``.

    Attributes:
        train_loss: Mean over the epoch, while learning.
        train_accuracy: In [0, 1].
        test_loss: At the end of the epoch.
        test_accuracy: In [0, 1].

    Example:
        >>> EpochRecord(train_loss=0.9, train_accuracy=0.7, test_loss=1.1, test_accuracy=0.6).test_accuracy
        0.6
    """

    train_loss: float
    train_accuracy: float | None
    test_loss: float
    test_accuracy: float | None


class Progress(NamedTuple):
    """Where a run is: steps done of how many, epoch counted from 1, its loss and accuracy so far.

    Attributes:
        step: Optimizer steps done.
        total_steps: Those of the whole run.
        epoch: The present one.
        epochs: How many there are.
        loss: Mean of the epoch so far.
        accuracy: In [0, 1]; ``None`` of numbers.

    Example:
        >>> Progress(step=50, total_steps=100, epoch=1, epochs=2, loss=0.9, accuracy=None).epoch
        1
    """

    step: int
    total_steps: int
    epoch: int
    epochs: int
    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class History:
    """What a finished run went through.

    Args:
        epochs: One record per epoch.
        seconds: Wall-clock time of training and evaluation, added up over interruptions.

    Example:
        >>> History((EpochRecord(0.9, 0.7, 1.1, 0.6),), seconds=2.5).test_accuracy
        0.6
    """

    epochs: tuple[EpochRecord, ...]
    seconds: float

    @property
    def test_accuracy(self) -> float:
        """The accuracy on the test data at the end.

        Raises:
            ValueError: If numbers were predicted, which have none.
        """
        accuracy = self.epochs[-1].test_accuracy
        if accuracy is None:
            raise ValueError("only classes have an accuracy; read epochs[-1].test_loss.")
        return accuracy

    def to_json(self) -> dict[str, object]:
        """Return the last test loss and accuracy, the seconds and the record of each epoch, as JSON values."""
        return {
            "test_loss": self.epochs[-1].test_loss,
            "test_accuracy": self.epochs[-1].test_accuracy,
            "seconds": self.seconds,
            "epochs": [record._asdict() for record in self.epochs],
        }


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: Adam with a one-cycle learning rate.

    Args:
        epochs: Passes over the training data, at least 1.
        batch_size: Samples per step, at least 1; the last batch of an epoch may be smaller.
        max_learning_rate: Peak of the learning rate.
        seed: Decides the order of the samples together with the epoch, at least 0.

    Raises:
        TypeError, ValueError: If a field is out of range.

    Example:
        >>> Recipe(epochs=2, batch_size=32, max_learning_rate=1e-3, seed=0).epochs
        2
    """

    epochs: int
    batch_size: int
    max_learning_rate: float
    seed: int

    def __post_init__(self) -> None:
        for name, check in (
            ("epochs", checks.positive_integer),
            ("batch_size", checks.positive_integer),
            ("max_learning_rate", checks.positive),
            ("seed", checks.non_negative_integer),
        ):
            # Numbers of numpy become Python's own, which JSON has a form for.
            object.__setattr__(self, name, check(name, getattr(self, name)))


def fit_supervised(
    model: nn.Module,
    train: Labelled,
    test: Labelled,
    recipe: Recipe,
    *,
    checkpoint: str | Path | None = None,
    settings: dict[str, object] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> History:
    """Train ``model`` in place, continuing from ``checkpoint`` if that file exists.

    A run that is stopped and continued, however often, gives bitwise the weights, the history and the random
    state of one that was not, on the same machine with the same number of threads.

    Args:
        model: Maps a batch of inputs to one score per class, ``(samples, classes, ...)``, or to the numbers; already on
            the device to train on.
        train: Training data, moved to the device of ``model`` once.
        test: Data that each epoch ends with an evaluation on; its sequences may have another length.
        recipe: How to train.
        checkpoint: File to continue from and to save to, from time to time and at the end, in a folder that exists;
            ``None`` saves nothing.
        settings: What else decides the numbers, such as model and data, as JSON values. A checkpoint with
            other settings or another recipe is refused.
        on_progress: Called a few times a second and at the end of each epoch.
        should_stop: Asked after each step; when it says yes, the checkpoint is written and the run ends.

    Returns:
        The history of the whole run.

    Raises:
        TypeError, ValueError: If an argument is no such thing, has no samples or nothing to train, or if data, labels
            and the outputs of ``model`` do not fit each other. Only what takes the outputs is found after the first
            forward pass, the rest before any work.
        FileNotFoundError: If the folder of ``checkpoint`` does not exist.
        CheckpointError: If ``checkpoint`` exists and cannot be continued from.
        KeyboardInterrupt: If ``should_stop`` ended the run.

    Example:
        >>> data = Labelled(torch.randn(64, 3), torch.randint(2, (64,)))
        >>> recipe = Recipe(epochs=2, batch_size=16, max_learning_rate=1e-2, seed=0)
        >>> len(fit_supervised(nn.Linear(3, 2), data, data, recipe).epochs)
        2
    """
    train, test = checked("train", train), checked("test", test)
    check_alike(train, test)
    checks.instance("recipe", recipe, Recipe, "Try Recipe(epochs=2, batch_size=32, max_learning_rate=1e-3, seed=0).")
    _check_function("should_stop", should_stop)
    if on_progress is not None:
        _check_function("on_progress", on_progress)
    settings = {} if settings is None else settings
    check_json("settings", settings)
    checkpoint = None if checkpoint is None else Path(checkpoint)
    if checkpoint is not None and not checkpoint.parent.is_dir():
        raise FileNotFoundError(f"`checkpoint` must lie in a folder that exists; got {checkpoint}. Make it first.")
    device = _device_of(model)
    classes = max(number_of_classes(train.labels), number_of_classes(test.labels))
    train, test = (Labelled(data.inputs.to(device), data.labels.to(device)) for data in (train, test))
    steps_per_epoch = -(-len(train.labels) // recipe.batch_size)
    total_steps = recipe.epochs * steps_per_epoch
    schedule = OneCycle(total_steps, recipe.max_learning_rate)
    optimizer = torch.optim.Adam(model.parameters(), lr=schedule.learning_rate(0))
    all_settings = {**settings, **asdict(recipe)}

    step, records, seconds = 0, list[EpochRecord](), 0.0
    loss_sum = torch.zeros((), device=device)
    correct = torch.zeros((), device=device, dtype=torch.int64)
    places = train.labels[0].numel()
    if checkpoint is not None and checkpoint.exists():
        position = load_checkpoint(checkpoint, model=model, optimizer=optimizer, settings=all_settings)
        step, seconds = cast(int, position["step"]), cast(float, position["seconds"])
        records = [EpochRecord(*record) for record in cast(list[list[float]], position["epochs"])]
        loss_sum.fill_(cast(float, position["loss_sum"]))
        correct.fill_(cast(int, position["correct"]))

    started = time.perf_counter() - seconds
    saved_at = reported_at = time.perf_counter()
    order = _sample_order(recipe.seed, step // steps_per_epoch, len(train.labels)).to(device)
    model.train()
    while step < total_steps:
        epoch, batch = divmod(step, steps_per_epoch)
        rows = order[batch * recipe.batch_size : (batch + 1) * recipe.batch_size]
        loss, hits = _train_step(model, optimizer, schedule, step, train.inputs[rows], train.labels[rows], classes)
        loss_sum += loss * len(rows)
        correct += hits
        step += 1

        epoch_is_over = step % steps_per_epoch == 0
        now = time.perf_counter()
        if on_progress is not None and (epoch_is_over or now - reported_at > _SECONDS_BETWEEN_REPORTS):
            seen = batch * recipe.batch_size + len(rows)
            mean_loss, accuracy = loss_sum.item() / seen, correct.item() / (seen * places) if classes else None
            on_progress(Progress(step, total_steps, epoch + 1, recipe.epochs, mean_loss, accuracy))
            reported_at = now
        if epoch_is_over:
            samples = len(train.labels)
            accuracy = correct.item() / (samples * places) if classes else None
            records.append(EpochRecord(loss_sum.item() / samples, accuracy, *evaluate(model, test)))
            loss_sum.zero_()
            correct.zero_()
            order = _sample_order(recipe.seed, epoch + 1, samples).to(device)
        seconds = time.perf_counter() - started

        stopping = step < total_steps and should_stop()
        due = time.perf_counter() - saved_at > _SECONDS_BETWEEN_CHECKPOINTS
        if checkpoint is not None and (stopping or step == total_steps or due):
            position = {"step": step, "epochs": records, "seconds": seconds}
            position |= {"loss_sum": loss_sum.item(), "correct": correct.item()}
            save_checkpoint(checkpoint, model=model, optimizer=optimizer, settings=all_settings, position=position)
            saved_at = time.perf_counter()
        if stopping:
            raise KeyboardInterrupt
    return History(tuple(records), seconds)


def evaluate(model: nn.Module, data: Labelled) -> tuple[float, float | None]:
    """Return the mean loss and the accuracy of ``model`` on ``data``, without gradients.

    Args:
        model: Evaluated in ``eval()`` mode and left, each of its modules, in the mode it was in.
        data: At least one sample, on the device of ``model``.

    Returns:
        Loss, and accuracy in [0, 1], which only classes have.

    Raises:
        TypeError, ValueError: If ``data`` is no such thing or has no samples, or its labels do not fit the outputs of
            ``model``.

    Example:
        >>> loss, accuracy = evaluate(nn.Identity(), Labelled(torch.eye(2), torch.tensor([0, 1])))
        >>> accuracy
        1.0
    """
    checks.instance("model", model, nn.Module, "Functions go into a module's forward.")
    data = checked("data", data)
    classes = number_of_classes(data.labels)
    loss_sum, correct = 0.0, 0
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(data.labels), _EVALUATION_BATCH):
                labels = data.labels[start : start + _EVALUATION_BATCH]
                scores = model(data.inputs[start : start + _EVALUATION_BATCH])
                loss_sum += _loss(scores, labels, classes).item() * len(labels)
                correct += int(_hits(scores, labels))
    finally:
        for module, training in modes.items():
            module.training = training
    accuracy = None if data.labels.is_floating_point() else correct / data.labels.numel()
    return loss_sum / len(data.labels), accuracy


def _check_function(name: str, function: object) -> None:
    if not callable(function):
        raise TypeError(f"`{name}` must be a function; got {function!r}.")


def _device_of(model: object) -> torch.device:
    """Return the device of the parameters of ``model``, of which at least one can be trained."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module; got {model!r}.")
    parameters = list(model.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        advice = "Try model.requires_grad_()." if parameters else "evaluate() needs none."
        raise ValueError(f"`model` must have a parameter that can be trained; of {len(parameters)} none can. {advice}")
    return parameters[0].device


def _loss(outputs: Tensor, labels: Tensor, classes: int) -> Float[Tensor, ""]:
    """Return the mean loss of a batch out of data with so many ``classes``; what is checked here is on the host."""
    checks.instance("model(inputs)", outputs, Tensor, "Wrap a model that returns more than its scores.")
    if not labels.is_floating_point():
        check_scores(tuple(outputs.shape), tuple(labels.shape), classes)
        return nn.functional.cross_entropy(outputs, labels)
    if outputs.shape != labels.shape:  # which the mean square would broadcast
        raise ValueError(
            f"`model` must return numbers of shape {tuple(labels.shape)}; got {tuple(outputs.shape)}. "
            "If the labels are classes, make them integers: labels.long()."
        )
    return nn.functional.mse_loss(outputs, labels)


def _hits(outputs: Tensor, labels: Tensor) -> Int[Tensor, ""]:
    """Return how many classes are right; 0 for numbers."""
    if labels.is_floating_point():
        return torch.zeros((), dtype=torch.int64, device=labels.device)
    return (outputs.argmax(1) == labels).sum()


def _train_step(
    model: nn.Module,
    optimizer: torch.optim.Adam,
    schedule: OneCycle,
    step: int,
    inputs: Tensor,
    labels: Tensor,
    classes: int,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Take one optimizer step; return the batch's mean loss and its number of right answers."""
    for group in optimizer.param_groups:
        group["lr"] = schedule.learning_rate(step)
        group["betas"] = (schedule.momentum(step), group["betas"][1])
    optimizer.zero_grad()
    scores = model(inputs)
    loss = _loss(scores, labels, classes)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach(), _hits(scores.detach(), labels)


def _sample_order(seed: int, epoch: int, samples: int) -> Int[Tensor, " samples"]:
    """Return the order of the samples in an epoch, which depends on nothing but the arguments."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(samples))
