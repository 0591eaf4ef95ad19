"""State matrices as operators on rows: ``x -> x A^T``, dense, sparse, low rank or strictly triangular.

Samples are rows, so ``apply(x)`` is the paper's ``A x`` for each sample. What is admissible is not decided here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from idl.linalg import sparse, systems
from idl.linalg.norms import row_sum_bounds, row_sums


def to_precise(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, or as it is on a device without float64."""
    return tensor if tensor.device.type == "mps" else tensor.to(torch.float64)


@dataclass(frozen=True)
class Dense:
    """An ``n x n`` matrix.

    Example:
        >>> Dense(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).apply(torch.tensor([[1.0, 0.0]]))
        tensor([[1., 3.]])
    """

    matrix: Tensor

    @property
    def dim(self) -> int:
        """Size of the state."""
        return self.matrix.shape[-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that gradients flow to; ``type(self)(*tensors)`` rebuilds the operator."""
        return (self.matrix,)

    def apply(self, x: Tensor) -> Tensor:
        """Return ``x A^T``."""
        return x @ self.matrix.T

    def apply_into(self, x: Tensor, out: Tensor, *, plus: Tensor | None = None) -> Tensor:
        """Write ``x A^T + plus`` into ``out``."""
        if plus is None:
            return torch.mm(x, self._transposed, out=out)
        return torch.addmm(plus, x, self._transposed, out=out)

    @cached_property
    def _transposed(self) -> Tensor:
        return self.matrix.T  # made once: for small states the view costs a tenth of the product

    def transpose(self) -> "Dense":
        """Return the operator of ``A^T``."""
        return type(self)(self.matrix.T)

    def pullback(self, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Return the gradient of ``sum(v * apply(x))`` with respect to :attr:`tensors`."""
        return (v.T @ x,)

    def pushforward(self, x: Tensor, tangents: Sequence[Tensor | None]) -> Tensor | None:
        """Return the change of ``apply(x)`` when :attr:`tensors` move along ``tangents``; ``None`` if none moves."""
        (moved,) = tangents
        return None if moved is None else x @ moved.T

    def diagonal(self) -> Tensor:
        """Return the diagonal of ``A``."""
        return self.matrix.diagonal()

    def off_diagonal(self, gain: Tensor | None = None) -> "Dense":
        """Return the operator of ``A`` with a diagonal of zeros, and rows multiplied by ``gain``."""
        scaled = self.matrix.clone() if gain is None else self.matrix * gain[:, None]
        return Dense(scaled.fill_diagonal_(0))

    @property
    def can_solve(self) -> bool:
        """Whether :meth:`solve` is affordable: beyond this size one row takes longer than thousands of products."""
        return self.dim <= 1024

    solve_is_cheap = False

    def solve(self, slope: Tensor, rhs: Tensor) -> Tensor:
        """Solve ``v - slope * (v A^T) = rhs`` for each row by LU: ``O(n^3)`` a row, in chunks of bounded memory."""
        chunk = max(1, 2**24 // (self.dim * self.dim))
        pieces = zip(torch.split(slope, chunk), torch.split(rhs[:, :, None], chunk), strict=True)
        return torch.cat([self.solve_columns(slopes, columns)[:, :, 0] for slopes, columns in pieces])

    def solve_columns(self, slope: Tensor, columns: Tensor) -> Tensor:
        """Solve ``(I - diag(slope) A) V = columns`` for each row, ``columns`` of shape ``(rows, n, k)``, by LU."""
        eye = torch.eye(self.dim, dtype=slope.dtype, device=slope.device)
        return systems.solve(eye - slope[:, :, None] * self.matrix, columns)

    @cached_property
    def precise(self) -> "Dense":
        """The operator in float64 where the device has it; converted once."""
        return type(self)(to_precise(self.matrix))

    def inf_norm(self) -> Tensor:
        r"""Return :math:`\|A\|_\infty`, the largest row sum of ``|A|``."""
        return row_sums(self.matrix).amax()

    @cached_property
    def row_sum_bound(self) -> float:
        """A bound on the row sums of ``|A|`` at the price of a product: here the largest of them."""
        return float(self.inf_norm()) if self.dim else 0.0

    @cached_property
    def column_sum_bound(self) -> float:
        """A bound on the column sums of ``|A|``, as :attr:`row_sum_bound` is on those of the rows."""
        return self.transpose().row_sum_bound

    def detached(self) -> "Dense":
        """Return the operator without its gradient."""
        return type(self)(self.matrix.detach())

    def dense(self) -> Tensor:
        """Return ``A``."""
        return self.matrix

    def quickest(self) -> "StateMatrix":
        """Return an equal operator whose products take the least time, for many of them."""
        return type(self)(self.matrix.T.contiguous().T)


@dataclass(frozen=True)
class StrictlyUpper(Dense):
    """A strictly upper triangular matrix: unit ``i`` reads units ``j > i``. Entries elsewhere must be zero."""

    def transpose(self) -> "StrictlyLower":
        """Return the operator of ``A^T``."""
        return StrictlyLower(self.matrix.T)


@dataclass(frozen=True)
class StrictlyLower(Dense):
    """A strictly lower triangular matrix: unit ``i`` reads units ``j < i``. Entries elsewhere must be zero."""

    def transpose(self) -> StrictlyUpper:
        """Return the operator of ``A^T``."""
        return StrictlyUpper(self.matrix.T)


@dataclass(frozen=True)
class Sparse(Dense):
    """A matrix of few non-zeros in compressed rows (CSR), for inference: it gives no gradient."""

    def apply(self, x: Tensor) -> Tensor:
        """Return ``x A^T``."""
        return sparse.linear(x, self.matrix)

    def apply_into(self, x: Tensor, out: Tensor, *, plus: Tensor | None = None) -> Tensor:
        """Write ``x A^T + plus`` into ``out``."""
        return sparse.linear_into(x, self.matrix, out, plus)

    def transpose(self) -> "Sparse":
        """Return the operator of ``A^T``."""
        return Sparse(sparse.compressed(self.dense().T))

    def diagonal(self) -> Tensor:
        """Return the diagonal of ``A``."""
        own = self._rows == self.matrix.col_indices()
        values = self.matrix.values()
        return values.new_zeros(self.dim).index_put((self._rows[own],), values[own])

    def off_diagonal(self, gain: Tensor | None = None) -> "Sparse":
        """Return the operator of ``A`` with a diagonal of zeros, and rows multiplied by ``gain``."""
        values = torch.where(self._rows == self.matrix.col_indices(), 0, self.matrix.values())
        return Sparse(sparse.with_values(self.matrix, values if gain is None else values * gain[self._rows]))

    def inf_norm(self) -> Tensor:
        r"""Return :math:`\|A\|_\infty`."""
        return self._sums(self._rows)

    @cached_property
    def column_sum_bound(self) -> float:
        """The largest column sum of ``|A|``."""
        return float(self._sums(self.matrix.col_indices())) if self.dim else 0.0

    def _sums(self, places: Tensor) -> Tensor:
        """Return the largest sum of the magnitudes that share a place."""
        values = self.matrix.values().abs()
        return values.new_zeros(self.dim).index_add_(0, places, values).amax()

    @cached_property
    def _rows(self) -> Tensor:
        starts = self.matrix.crow_indices()
        return torch.arange(self.dim, device=starts.device).repeat_interleave(starts.diff())

    def quickest(self) -> "Sparse":
        """Return the operator as it is."""
        return self

    def solve(self, slope: Tensor, rhs: Tensor) -> Tensor:
        """Solve ``v - slope * (v A^T) = rhs`` for each row by LU."""
        return Dense(self.dense()).solve(slope, rhs)

    def solve_columns(self, slope: Tensor, columns: Tensor) -> Tensor:
        """Solve ``(I - diag(slope) A) V = columns`` for each row by LU."""
        return Dense(self.dense()).solve_columns(slope, columns)

    def dense(self) -> Tensor:
        """Return ``A``."""
        return self.matrix.to_dense()


@dataclass(frozen=True)
class Factored:
    """A matrix ``A = left right^T`` of low rank, never multiplied out: ``O(n r)`` a product.

    Example:
        >>> Factored(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])).dense()
        tensor([[3., 4.],
                [6., 8.]])
    """

    left: Tensor
    right: Tensor

    @property
    def dim(self) -> int:
        """Size of the state."""
        return self.left.shape[-2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that gradients flow to; ``type(self)(*tensors)`` rebuilds the operator."""
        return (self.left, self.right)

    def apply(self, x: Tensor) -> Tensor:
        """Return ``x A^T``, through the ``r`` numbers ``x right``."""
        return (x @ self.right) @ self.left.T

    def apply_into(self, x: Tensor, out: Tensor, *, plus: Tensor | None = None) -> Tensor:
        """Write ``x A^T + plus`` into ``out``."""
        s = x @ self.right
        if plus is None:
            return torch.mm(s, self.left.T, out=out)
        return torch.addmm(plus, s, self.left.T, out=out)

    def transpose(self) -> "Factored":
        """Return the operator of ``A^T``."""
        return Factored(self.right, self.left)

    def pullback(self, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of ``sum(v * apply(x))`` with respect to ``left`` and ``right``."""
        return v.T @ (x @ self.right), x.T @ (v @ self.left)

    def pushforward(self, x: Tensor, tangents: Sequence[Tensor | None]) -> Tensor | None:
        """Return the change of ``apply(x)`` when :attr:`tensors` move along ``tangents``; ``None`` if none moves."""
        left, right = tangents
        by_left = None if left is None else (x @ self.right) @ left.T
        by_right = None if right is None else (x @ right) @ self.left.T
        return by_left if by_right is None else by_right if by_left is None else by_left + by_right

    def diagonal(self) -> Tensor:
        """Return the diagonal of ``A``."""
        return (self.left * self.right).sum(-1)

    can_solve = True

    @property
    def solve_is_cheap(self) -> bool:
        """Whether :meth:`solve` costs no more than a few dozen products."""
        return self.left.shape[1] <= 32

    def solve(self, slope: Tensor, rhs: Tensor) -> Tensor:
        """Solve ``v - slope * (v A^T) = rhs`` by the Woodbury identity: an ``r x r`` system and ``O(n r^2)`` a row."""
        s = systems.solve(self._small(slope), (rhs @ self.right)[:, :, None])
        return rhs + slope * (s[:, :, 0] @ self.left.T)

    def solve_columns(self, slope: Tensor, columns: Tensor) -> Tensor:
        """Solve ``(I - diag(slope) A) V = columns`` for each row by the Woodbury identity."""
        s = systems.solve(self._small(slope), self.right.T @ columns)
        return columns + slope[:, :, None] * (self.left @ s)

    @property
    def inverses_are_cheap(self) -> bool:
        """Whether :meth:`inverses` take no longer than a few products: torch has a fast way for very small systems."""
        return self.left.shape[1] <= 4

    def inverses(self, slope: Tensor) -> Tensor:
        """Return what :meth:`solve_by` needs to solve for each ``slope``, ``(rows, r, r)``."""
        return torch.linalg.inv_ex(self._small(slope))[0].transpose(1, 2)

    def solve_by(self, inverses: Tensor, slope: Tensor, rhs: Tensor, out: Tensor | None = None) -> Tensor:
        """Solve for ``slope`` and ``rhs`` as :meth:`solve` does, with the ``inverses`` there are, into ``out``."""
        s = torch.bmm((rhs @ self.right)[:, None], inverses)[:, 0]
        return torch.addcmul(rhs, slope, s @ self.left.T, out=out)

    def _small(self, slope: Tensor) -> Tensor:
        n, r = self.left.shape
        outer = (self.right[:, :, None] * self.left[:, None, :]).reshape(n, r * r)
        eye = torch.eye(r, dtype=slope.dtype, device=slope.device)
        return eye - (slope @ outer).reshape(-1, r, r)

    @cached_property
    def precise(self) -> "Factored":
        """The operator in float64 where the device has it; converted once."""
        return Factored(to_precise(self.left), to_precise(self.right))

    def inf_norm(self) -> Tensor:
        r"""Return :math:`\|A\|_\infty`; ``A`` is multiplied out some rows at a time: ``n^2`` numbers are never held."""
        chunks = torch.split(self.left, 1024)
        return torch.stack([row_sums(rows @ self.right.T).amax() for rows in chunks]).amax()

    @cached_property
    def row_sum_bound(self) -> float:
        """A bound on the row sums of ``|A|`` in ``O(n r)``: those of ``|left| |right|^T``."""
        return float(row_sum_bounds(self.left, self.right).amax()) if self.dim else 0.0

    @cached_property
    def column_sum_bound(self) -> float:
        """A bound on the column sums of ``|A|``, as :attr:`row_sum_bound` is on those of the rows."""
        return self.transpose().row_sum_bound

    def detached(self) -> "Factored":
        """Return the operator without its gradient."""
        return Factored(self.left.detach(), self.right.detach())

    def dense(self) -> Tensor:
        """Return ``A``, multiplied out."""
        return self.left @ self.right.mT

    def quickest(self) -> "StateMatrix":
        """Return an equal operator whose products take the least time, for many of them."""
        return Dense(self.dense()).quickest() if self.dim <= 64 else self


StateMatrix = Dense | Factored
