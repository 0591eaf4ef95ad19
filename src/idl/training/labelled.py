"""Data to learn from, and what is checked of it: by itself, of training against test, of labels against scores.

How a model learns from it is not known here.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor


class Labelled(NamedTuple):
    """Inputs, one per row, and what is to be predicted of each: a class, several of them, or numbers.

    Attributes:
        inputs: Inputs, ``(samples, ...)``.
        labels: Classes, ``(samples, ...)`` integers from 0 or booleans, or numbers, ``(samples, q)``.

    Example:
        >>> import torch
        >>> data = Labelled(inputs=torch.rand(5, 3), labels=torch.tensor([0, 1, 1, 0, 1]))
        >>> len(data.labels)
        5
    """

    inputs: Float[Tensor, "samples ..."] | Int[Tensor, "samples ..."]
    labels: Integer[Tensor, "samples ..."] | Bool[Tensor, "samples ..."] | Float[Tensor, "samples q"]


def checked(name: str, data: object) -> Labelled:
    """Return ``data``, with classes as int64, if it has at least one sample and a label for each."""
    if not isinstance(data, Labelled):
        raise TypeError(f"`{name}` must be Labelled(inputs, labels); got a {type(data).__name__}.")
    for part, values in data._asdict().items():
        if not isinstance(values, Tensor):
            advice = f"Try torch.as_tensor({part})."
            raise TypeError(f"`{name}.{part}` must be a torch.Tensor; got a {type(values).__name__}. {advice}")
        if values.dim() == 0:
            raise ValueError(f"`{name}.{part}` must have one row per sample; got a single number.")
    inputs, labels = data
    if len(inputs) != len(labels):
        raise ValueError(f"`{name}` must have a label for each input; got {len(inputs)} inputs, {len(labels)} labels.")
    if labels.numel() == 0:
        raise ValueError(f"`{name}` needs samples; got labels of shape {tuple(labels.shape)}.")
    if labels.is_floating_point():
        return data
    labels = labels.long()
    if (least := int(labels.min())) < 0:
        raise ValueError(f"`{name}.labels` must be classes from 0; got {least}.")
    return Labelled(inputs, labels)


def check_alike(train: Labelled, test: Labelled) -> None:
    """Raise if a model cannot be for both; the length of sequences may differ."""
    for part, ours, theirs in zip(Labelled._fields, train, test, strict=True):
        wanted, got = (str(values.dtype) if values.is_floating_point() else "integers" for values in (ours, theirs))
        if wanted != got:
            raise TypeError(f"`test.{part}` must be {wanted}, as `train.{part}` is; got {got}.")
        # An axis may be a length: of floats from the third on, of integers, which are tokens, from the second on.
        rows = ours.is_floating_point() and ours.dim() == 2
        if ours.dim() != theirs.dim() or (rows and ours.shape[1] != theirs.shape[1]):
            raise ValueError(
                f"`test.{part}` must be of the same shape as `train.{part}`, but for the number of samples and the "
                f"length of sequences; got {tuple(theirs.shape)} beside {tuple(ours.shape)}."
            )


def number_of_classes(labels: Tensor) -> int:
    """Return the number of classes that are needed for ``labels``, 0 for numbers; waits for the device."""
    return 0 if labels.is_floating_point() else int(labels.max()) + 1


def check_scores(scores: tuple[int, ...], labels: tuple[int, ...], classes: int) -> None:
    """Raise if scores and classes of these shapes do not fit each other."""
    if len(scores) < 2:
        raise ValueError(f"`model` must return scores of shape (samples, classes, ...); got {scores}.")
    if labels != (expected := scores[:1] + scores[2:]):
        raise ValueError(
            f"`labels` must have shape {expected} because the scores of `model` have {scores}; got {labels}. "
            "Try labels.squeeze(1) for a column, labels.argmax(1) for one-hot rows, labels.float() for numbers."
        )
    if classes > scores[1]:
        raise ValueError(
            f"`labels` must be in 0..{scores[1] - 1} because `model` returns {scores[1]} scores; got {classes - 1}."
        )
