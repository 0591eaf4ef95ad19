"""Which rows of a packed batch of sequences belong to which time."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Timeline:
    """The order of rows in a batch of sequences, time by time and the longest sequence first, as PyTorch packs them.

    Args:
        sizes: Rows at each time, not increasing: the sequences that are still running.
        backwards: Whether each sequence is read from its last time to its first.
    """

    sizes: tuple[int, ...]
    backwards: bool = False

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.sizes[0]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first row of each time, and the number of rows."""
        return tuple(accumulate(self.sizes, initial=0))

    @property
    def rows(self) -> int:
        """Number of rows of all times together."""
        return self.starts[-1]

    @property
    def order(self) -> range:
        """The times in the order in which they are read."""
        times = range(len(self.sizes))
        return times[::-1] if self.backwards else times

    def reversed(self) -> "Timeline":
        """Return the same rows, read the other way round."""
        return replace(self, backwards=not self.backwards)

    def widened(self, size: int) -> "Timeline":
        """Return the timeline in which ``size`` rows stand in the place of each."""
        return replace(self, sizes=tuple(size * rows for rows in self.sizes))

    def after(self, values: Tensor, last: Tensor) -> Tensor:
        """Return for each row the value that its sequence has one time later in reading order.

        Args:
            values: One row a row.
            last: What comes after the last time that is read, one row a sequence.
        """
        if self.sizes[-1] == self.sizes[0]:
            kept = self.rows - self.batch
            return torch.cat((last, values[:kept]) if self.backwards else (values[self.batch :], last))
        return torch.cat((last, values))[self._after.to(values.device)]

    def by_place(self, values: Tensor) -> Tensor:
        """Return the rows as ``(times, batch, ...)``, places in reading order, and zeros where a sequence ended."""
        shape = (len(self.sizes), self.batch, *values.shape[1:])
        if self.sizes[-1] == self.sizes[0]:
            padded = values.reshape(shape)
            return padded.flip(0) if self.backwards else padded
        padded = values.new_zeros(shape)
        padded.flatten(0, 1)[self._places.to(values.device)] = values
        return padded

    def by_row(self, padded: Tensor) -> Tensor:
        """Return the rows of what :meth:`by_place` returns."""
        if self.sizes[-1] == self.sizes[0]:
            return (padded.flip(0) if self.backwards else padded).flatten(0, 1)
        return padded.flatten(0, 1)[self._places.to(padded.device)]

    @cached_property
    def lengths(self) -> Tensor:
        """Number of times of each sequence."""
        return (torch.tensor(self.sizes)[:, None] > torch.arange(self.batch)).sum(0)

    def of(self, sequences: Tensor) -> tuple["Timeline", Tensor]:
        """Return the timeline of these sequences, a mask ``(batch,)``, and a mask of the rows that are theirs."""
        chosen = sequences.cpu()
        sizes = (torch.tensor(self.sizes)[:, None] > torch.arange(self.batch)[chosen]).sum(1).tolist()
        rows = torch.cat([chosen[:size] for size in self.sizes])
        return replace(self, sizes=tuple(size for size in sizes if size)), rows.to(sequences.device)

    @cached_property
    def _places(self) -> Tensor:
        """Index of each row in ``(times, batch)``."""
        within = torch.cat([torch.arange(size) for size in self.sizes])
        times = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))
        return (self.lengths[within] - 1 - times if self.backwards else times) * self.batch + within

    @cached_property
    def _after(self) -> Tensor:
        """Indices into the values after the last time, followed by all values."""
        later = [torch.arange(size) for size in self.sizes]
        for time, after in zip(self.order, self.order[1:], strict=False):
            shared = min(self.sizes[after], self.sizes[time])
            start = self.batch + self.starts[after]
            later[time][:shared] = torch.arange(start, start + shared)
        return torch.cat(later)
