"""Products with matrices of few non-zeros, in compressed rows (CSR), for inference: no gradient flows to them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

# Where CSR takes less time than the dense product for every batch, on one thread and on two (benchmarks/README.md).
_MOST = 0.07  # part of the entries that are not zero
_SMALLEST = 500_000  # entries
_ROWS = 64  # samples that are multiplied at once, so that their columns stay in the cache


def compression_pays(matrix: Tensor) -> bool:
    """Return whether products with a dense matrix take less time in compressed rows."""
    full_precision = matrix.dtype in (torch.float32, torch.float64)
    large = full_precision and matrix.device.type == "cpu" and matrix.numel() >= _SMALLEST
    return large and int(matrix.count_nonzero()) <= _MOST * matrix.numel()


def compressed(matrix: Tensor) -> Tensor:
    """Return a dense matrix in compressed rows, without its gradient."""
    with _quiet():
        return matrix.detach().to_sparse_csr()


def with_values(matrix: Tensor, values: Tensor) -> Tensor:
    """Return a matrix in compressed rows with other values in the places of ``matrix``."""
    places = matrix.crow_indices(), matrix.col_indices()
    with _quiet():
        return torch.sparse_csr_tensor(*places, values, matrix.shape, check_invariants=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what torch says once of compressed rows: they are young and, in 2.11 whatever is passed, unchecked."""
    with warnings.catch_warnings():
        for message in ("Sparse CSR tensor support is in beta", "Sparse invariant checks are implicitly disabled"):
            warnings.filterwarnings("ignore", message, UserWarning)
        yield


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x weight^T + bias`` as :func:`torch.nn.functional.linear` does, also for compressed rows.

    Args:
        x: Samples, ``(..., p)``.
        weight: ``(n, p)``.
        bias: ``(n,)``.
    """
    if weight.layout != torch.sparse_csr:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(len(rows), len(weight))
    return linear_into(rows, weight, out, bias).reshape(*x.shape[:-1], len(weight))


def linear_into(x: Tensor, weight: Tensor, out: Tensor, plus: Tensor | None = None) -> Tensor:
    """Write ``x weight^T + plus`` into ``out`` for a weight in compressed rows, some samples at a time."""
    plus = None if plus is None else plus.expand_as(out)
    for start in range(0, len(x), _ROWS):
        part = slice(start, start + _ROWS)
        product = (weight @ x[part].T.contiguous()).T
        if plus is None:
            out[part] = product
        else:
            torch.add(plus[part], product, out=out[part])
    return out
