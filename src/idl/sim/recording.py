"""What a teacher shows on the samples of a loader: the first pass, and what a second one must share with it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from idl import checks
from idl.sim.capture import Matrices, Recording, Teacher
from idl.sim.moments import Moments, accumulate


@dataclass(frozen=True)
class Recorded:
    """A teacher, and the moments of regressors ``[X U]`` and targets ``[Z Y]`` on the samples of a loader."""

    teacher: Teacher
    matrices: Matrices
    moments: Moments
    states: int
    inputs: int

    @property
    def biased(self) -> bool:
        """Whether the teacher has a bias anywhere."""
        return bool(self.matrices.b.any() or self.matrices.d.any())

    @property
    def state_moments(self) -> Moments:
        """Moments of ``[X U]`` and ``Z``."""
        return self.moments.part(slice(None), slice(None, self.states))

    @property
    def output_moments(self) -> Moments:
        """Moments of ``[X U]`` and ``Y``."""
        return self.moments.part(slice(None), slice(self.states, None))


def record(teacher: nn.Module, loader: Iterable[Any], layers: Sequence[str] | None = None) -> Recorded:
    """Run a teacher on all inputs of a loader once, and keep second moments only."""
    checks.instance("teacher", teacher, nn.Module, "Wrap a function in one.")
    if isinstance(loader, Tensor):
        raise TypeError("`loader` must yield batches; got a tensor, whose rows are single samples. Try [inputs].")
    if isinstance(loader, Iterator):
        raise TypeError("`loader` must be iterable twice, as a DataLoader or a list of batches is; got an iterator.")
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise TypeError(f"`loader` must yield batches of inputs; got {loader!r}. Try [inputs], or a DataLoader.")
    batches = iter(loader)
    seen, first = [], None
    for batch in batches:
        seen.append(batch)
        if len(first := _inputs(batch, teacher)):
            break
    if first is None or not len(first):
        raise ValueError("`loader` must yield at least one batch with at least one sample; got none.")
    watched = Teacher(teacher, first, layers)
    moments = accumulate(
        (torch.cat((recording.X, recording.U), 1), torch.cat((recording.Z, recording.Y), 1))
        for _, recording in recordings(watched, chain(seen, batches))
    )
    states = sum(layer.units for layer in watched.layers)
    return Recorded(watched, watched.matrices(), moments, states, len(moments.gram) - states)


def check_same_inputs(again: Moments, recorded: Recorded) -> None:
    """Check that the second pass saw the inputs of the first, which share a Gram matrix."""
    first = recorded.moments
    apart = (again.mean_S[-recorded.inputs :] - first.mean_S[-recorded.inputs :]).abs()
    size = (
        first.gram.diagonal()[-recorded.inputs :].clamp_min(0).sqrt()
    )  # the order of summation shows in the last digits
    if again.samples != first.samples or bool((apart > 1e-9 * size).any()):
        raise ValueError(
            "`loader` must yield the same samples each time it is passed over, in any order; the second pass differed. "
            "Leave random augmentation and sampling out, or make a list of the batches first."
        )


def recordings(teacher: Teacher, loader: Iterable[Any]) -> Iterator[tuple[Tensor, Recording]]:
    """Yield the inputs of each batch of a loader with what the teacher shows on them."""
    for batch in loader:
        u = _inputs(batch, teacher.module)
        if tuple(u.shape[1:]) != teacher.input_shape:
            raise ValueError(
                f"`loader` must yield batches of one shape; after samples of shape {teacher.input_shape} came "
                f"{tuple(u.shape[1:])}."
            )
        if len(u):
            yield u, teacher.record(u)


def _inputs(batch: Any, teacher: nn.Module) -> Tensor:
    u = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    u = checks.floating_tensor("loader", u)
    parameter = next(teacher.parameters(), None)
    return u if parameter is None else u.to(parameter.device)
