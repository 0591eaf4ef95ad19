"""What a teacher shows on the samples of a loader: the first pass, and what a second one must share with it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

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


def record(
    teacher: nn.Module,
    loader: Iterable[Any],
    layers: Sequence[str] | None = None,
    check: Callable[[int, int], None] = lambda states, inputs: None,
) -> Recorded:
    """Run a teacher on all inputs of a loader once, and keep second moments only.

    ``check`` is given the numbers of states and inputs as soon as they are known, and raises if they will not do.
    """
    check_sources(teacher, loader)
    batches = iter(loader)
    seen, first = [], None
    for batch in batches:
        seen.append(batch)
        if len(first := _inputs(batch, teacher)):
            break
    if first is None or not len(first):
        raise ValueError("`loader` must yield at least one batch with at least one sample; got none.")
    watched = Teacher(teacher, first, layers)
    states = sum(layer.units for layer in watched.layers)
    check(states, first[0].numel())
    moments = accumulate(
        (torch.cat((recording.X, recording.U), 1), torch.cat((recording.Z, recording.Y), 1))
        for _, recording in recordings(watched, chain(seen, batches))
    )
    return Recorded(watched, watched.matrices(), moments, states, len(moments.gram) - states)


def check_sources(teacher: object, loader: object) -> None:
    """Check what can be known of a teacher and its loader before anything is run."""
    checks.instance("teacher", teacher, nn.Module, "Wrap a function in one.")
    check_loader(loader)
    if isinstance(loader, Iterator):
        raise TypeError("`loader` must be iterable twice, as a DataLoader or a list of batches is; got an iterator.")


def check_loader(loader: object) -> None:
    """Check that a loader can be passed over, and is not what yields single samples."""
    if isinstance(loader, Tensor):
        raise TypeError("`loader` must yield batches; got a tensor, whose rows are single samples. Try [inputs].")
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise TypeError(
            f"`loader` must yield batches; got a {type(loader).__name__}, which has single samples. "
            "Try DataLoader(dataset, batch_size=256)."
        )
    if isinstance(loader, type) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise TypeError(f"`loader` must yield batches of inputs; got {loader!r}. Try [inputs], or a DataLoader.")


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
        if tuple(u.shape[1:]) != teacher.input_shape or u.dtype != teacher.dtype:
            raise ValueError(
                f"`loader` must yield batches of one shape and dtype; after samples of shape {teacher.input_shape} and "
                f"{teacher.dtype} came {tuple(u.shape[1:])} and {u.dtype}."
            )
        if len(u):
            yield u, teacher.record(u)


def inputs_of(batch: Any) -> Tensor:
    """Return the inputs of a batch, which may be a pair with labels."""
    u = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    u = checks.floating_tensor("loader", u)
    if u.dim() < 2:
        raise ValueError(
            f"`loader` must yield batches, with one row a sample; got inputs of shape {tuple(u.shape)}. "
            "Try DataLoader(dataset, batch_size=256), or u[None] for a sample by itself."
        )
    return u


def _inputs(batch: Any, teacher: nn.Module) -> Tensor:
    u, parameter = inputs_of(batch), next(teacher.parameters(), None)
    return u if parameter is None else u.to(parameter.device)
