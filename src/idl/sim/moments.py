"""Second moments of states, accumulated in float64 while samples stream by: all that training needs of the data."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_BLOCK = 128  # columns of a block of the Gram matrix; blocks below the diagonal are copies
_ROUNDING = 1e-14  # part of the mean square that is not variance: a float32 constant would vary by no more
_ROWS = 2048  # samples that are multiplied at once: small batches are gathered, large ones cut


@dataclass(frozen=True)
class Moments:
    """Mean products of regressors ``S`` and targets ``T`` over all samples, in float64.

    Attributes:
        gram: ``S^T S / m``.
        cross: ``T^T S / m``.
        energies: Mean squares of the targets.
        mean_S, mean_T: Means.
        samples: ``m``.
    """

    gram: Float[Tensor, "d d"]
    cross: Float[Tensor, "targets d"]
    energies: Float[Tensor, " targets"]
    mean_S: Float[Tensor, " d"]
    mean_T: Float[Tensor, " targets"]
    samples: int

    def centred(self) -> "Moments":
        """Return the moments about the means: those of a regression with an intercept."""
        variances = self.energies - self.mean_T.square()
        varies = variances > _ROUNDING * self.energies
        return Moments(
            self.gram - torch.outer(self.mean_S, self.mean_S),
            torch.where(varies[:, None], self.cross - torch.outer(self.mean_T, self.mean_S), 0),
            torch.where(varies, variances, 0),
            torch.zeros_like(self.mean_S),
            torch.zeros_like(self.mean_T),
            self.samples,
        )

    def part(self, columns: slice, targets: slice) -> "Moments":
        """Return the moments of some of the columns of ``S`` and of some of the targets."""
        return Moments(
            self.gram[columns, columns],
            self.cross[targets, columns],
            self.energies[targets],
            self.mean_S[columns],
            self.mean_T[targets],
            self.samples,
        )

    def scaled(self, columns: Tensor, targets: Tensor) -> "Moments":
        """Return the moments of ``columns * S`` and ``targets * T``."""
        return Moments(
            self.gram * columns[:, None] * columns,
            self.cross * targets[:, None] * columns,
            self.energies * targets.square(),
            self.mean_S * columns,
            self.mean_T * targets,
            self.samples,
        )


def accumulate(batches: Iterable[tuple[Tensor, Tensor]], last: Float[Tensor, "k k"] | None = None) -> Moments:
    """Return the moments of all batches ``(S, T)``, samples as rows.

    Memory is ``O(d^2)`` and does not depend on the number of samples; a sample costs ``d^2 / 2`` products.

    Args:
        batches: Regressors and targets.
        last: Gram matrix of the last columns of ``S``, if these samples have been seen before.

    Raises:
        ValueError: If there is no sample, the number of columns changes, or a value is not finite.
    """
    products = sums = energies = buffer = torch.empty(0)
    samples = d = known = 0
    for S, T in _regrouped(batches):
        if not samples:
            d, width = S.shape[1], S.shape[1] + T.shape[1]
            known = d if last is None else d - len(last)
            products, sums = (torch.zeros(*shape, width, dtype=torch.float64, device=S.device) for shape in ((d,), ()))
            energies = torch.zeros(width - d, dtype=torch.float64, device=S.device)
            buffer = torch.empty(width, _ROWS, dtype=torch.float64, device=S.device)
        # Columns as rows, in which order blocks of the product read memory in sequence; each copy does one thing.
        both = buffer[:, : len(S)]
        both[:d].copy_(S.T.contiguous())
        both[d:].copy_(T.T.contiguous())
        for start in range(0, d, _BLOCK):
            stop = min(start + _BLOCK, d)
            if stop <= known:  # the upper triangle: half of the work
                products[start:stop, start:].addmm_(both[start:stop], both[start:].T)
            else:
                products[start:known, start:].addmm_(both[start:known], both[start:].T)
                products[max(start, known) : stop, d:].addmm_(both[max(start, known) : stop], both[d:].T)
        energies += both[d:].square().sum(1)
        sums += both.sum(1)
        samples += len(S)
    if not samples:
        raise ValueError("`loader` must yield at least one sample; got none.")
    if not bool(torch.isfinite(products.diagonal().sum() + energies.sum() + sums.sum())):
        raise ValueError("`loader` and teacher must give finite states; got NaN or inf. Is the input finite?")
    products, sums, energies = products / samples, sums / samples, energies / samples
    gram = products[:, :d].triu()
    if last is not None:
        gram[known:, known:] = last.triu()
    gram = gram + gram.triu(1).T
    return Moments(gram, products[:, d:].T.contiguous(), energies, sums[:d], sums[d:], samples)


def _regrouped(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same samples in groups of a size that is multiplied well."""
    waiting: list[tuple[Tensor, Tensor]] = []
    count = 0
    for S, T in batches:
        if waiting and (S.shape[1] != waiting[0][0].shape[1] or T.shape[1] != waiting[0][1].shape[1]):
            raise ValueError(
                f"`loader` must yield batches of one shape; after {waiting[0][0].shape[1]} numbers of state and input "
                f"a sample came {S.shape[1]}."
            )
        for part_S, part_T in zip(torch.split(S, _ROWS), torch.split(T, _ROWS), strict=True):
            if count + len(part_S) > _ROWS:
                yield _joined(waiting)
                waiting, count = [], 0
            waiting.append((part_S, part_T))
            count += len(part_S)
    if count:
        yield _joined(waiting)


def _joined(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([S for S, _ in pairs]), torch.cat([T for _, T in pairs])
