"""Batches of sequences as rows, time by time, and back: padded, with lengths, packed by PyTorch, or a single one."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from idl import checks


@dataclass(frozen=True)
class Packing:
    """How the rows of a batch of sequences are ordered, and what they came as.

    Args:
        sizes: Rows at each time.
        times: Times of a padded result.
        batched: Whether there was a batch; else a single sequence.
        batch_first: Whether padded sequences have the batch before the time.
        order: Which sequence stands at each place, longest first; ``None`` where they stand as they are.
        packed: What PyTorch had packed.
    """

    sizes: tuple[int, ...]
    times: int
    batched: bool = True
    batch_first: bool = True
    order: Tensor | None = None
    packed: PackedSequence | None = None

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.sizes[0]

    def sorted(self, values: Tensor) -> Tensor:
        """Return values ``(..., batch, k)`` of sequences in the order of the rows."""
        values = values if self.batched else values.unsqueeze(-2)
        return values if self.order is None else values[..., self.order.to(values.device), :]

    def unsorted(self, values: Tensor) -> Tensor:
        """Return values ``(..., batch, k)`` in the order in which the sequences came."""
        if self.order is not None:
            values = values[..., self.order.argsort().to(values.device), :]
        return values if self.batched else values.squeeze(-2)

    def padded(self, rows: Tensor) -> Tensor:
        """Return the rows ``(rows, ...)`` as padded sequences, zero where a sequence has ended."""
        if self.sizes[-1] == self.sizes[0] and self.times == len(self.sizes) and self.order is None:
            by_time = rows.reshape(self.times, self.batch, *rows.shape[1:])
        else:
            flat = rows.new_zeros(self.times * self.batch, *rows.shape[1:])
            flat = flat.index_copy(0, self._places.to(rows.device), rows)
            by_time = flat.reshape(self.times, self.batch, *rows.shape[1:])
        if not self.batched:
            return by_time[:, 0]
        return by_time.transpose(0, 1) if self.batch_first else by_time

    def like_the_input(self, rows: Tensor) -> Tensor | PackedSequence:
        """Return the rows as the sequences came: padded, or packed."""
        return self.padded(rows) if self.packed is None else self.packed._replace(data=rows)

    @property
    def _places(self) -> Tensor:
        """The place of each row among ``times * batch`` padded ones, time by time."""
        sequences = torch.arange(self.batch) if self.order is None else self.order.cpu()
        return torch.cat([time * self.batch + sequences[:size] for time, size in enumerate(self.sizes)])


def pack(u: Any, lengths: Any, input_dim: int, batch_first: bool) -> tuple[Tensor, Packing]:
    """Return the rows of the sequences ``u``, longest first, time by time.

    Args:
        u: ``(batch, time, input_dim)``, or with the first two dimensions exchanged; ``(time, input_dim)``; or packed.
        lengths: Number of times of each sequence; ``None`` for all.
        input_dim: Size of an input.
        batch_first: Whether the batch comes before the time.

    Raises:
        TypeError, ValueError: If something does not fit.
    """
    if isinstance(u, PackedSequence):
        return _unwrapped(u, lengths, input_dim)
    u = checks.dense_tensor("u", u)
    batched, batch_axis = u.dim() == 3, 0 if batch_first else 1
    if u.dim() not in (2, 3) or u.shape[-1] != input_dim:
        shape = f"(batch, time, {input_dim})" if batch_first else f"(time, batch, {input_dim})"
        raise ValueError(
            f"`u` must have shape {shape}, or (time, {input_dim}) for a single sequence; got {tuple(u.shape)}."
            + ("\n    Give one number a time an axis of its own: u[..., None]." if input_dim == 1 else "")
        )
    by_time = u[:, None] if not batched else u.transpose(0, 1) if batch_first else u
    times, batch = by_time.shape[:2]
    if times == 0:
        raise ValueError(f"`u` must have at least one time; got shape {tuple(u.shape)}. Leave empty sequences out.")
    if lengths is None:
        packing = Packing((batch,) * times, times, batched, batch_first)
        return by_time.reshape(times * batch, input_dim), packing
    if not batched:
        raise ValueError(f"`lengths` must be None for a single sequence; got {lengths!r}. Cut it: u[:length].")
    known = _checked_lengths(lengths, batch, times, batch_axis)
    order = torch.tensor(known, dtype=torch.int64).argsort(descending=True, stable=True)
    sizes = tuple(sum(length > time for length in known) for time in range(max(known, default=1)))
    packing = Packing(sizes, times, batch_first=batch_first, order=order)
    return by_time.reshape(times * batch, input_dim)[packing._places.to(u.device)], packing


def _unwrapped(u: PackedSequence, lengths: Any, input_dim: int) -> tuple[Tensor, Packing]:
    if lengths is not None:
        raise ValueError("`lengths` must be None beside a PackedSequence, which has its own; got both.")
    data = checks.floating_tensor("u.data", u.data)
    if data.dim() != 2 or data.shape[1] != input_dim:
        raise ValueError(f"`u.data` must have shape (rows, {input_dim}); got {tuple(data.shape)}.")
    sizes = tuple(u.batch_sizes.tolist())
    return data, Packing(sizes, len(sizes), order=u.sorted_indices, packed=u)


def _checked_lengths(lengths: Any, batch: int, times: int, batch_axis: int) -> list[int]:
    if isinstance(lengths, Tensor):
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise TypeError(f"`lengths` must be integers; got {lengths.dtype}. Try lengths.long().")
        values = lengths.reshape(-1).tolist()
    elif isinstance(lengths, Iterable):
        values = list(lengths)
    else:
        raise TypeError(f"`lengths` must be a tensor or a list of integers; got {type(lengths).__name__}.")
    shape = tuple(lengths.shape) if isinstance(lengths, Tensor) else (len(values),)
    if shape != (batch,):
        raise ValueError(f"`lengths` must have shape ({batch},), since `u` has {batch} sequences; got {shape}.")
    known = [checks.positive_integer(f"lengths[{i}]", value) for i, value in enumerate(values)]
    if max(known, default=0) > times:
        i = known.index(max(known))
        raise ValueError(
            f"`lengths` must be at most {times}, the number of times of `u`; got {known[i]} at index {i}.\n"
            "    Does `u` have the batch where you expect it? See batch_first."
        )
    return known
