import pytest
import torch

from idl.linalg.norms import row_sums
from idl.linalg.operators import Dense, Factored


def test_row_sums_add_magnitudes_and_keep_the_dimension():
    assert torch.equal(row_sums(torch.tensor([[1.0, -2.0], [0.0, 3.0]])), torch.tensor([[3.0], [3.0]]))


def test_the_norm_of_a_dense_matrix_is_that_of_torch():
    A = torch.randn(9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(Dense(A).inf_norm()) == pytest.approx(float(torch.linalg.matrix_norm(A, torch.inf)), rel=1e-15)


@pytest.mark.parametrize("n", [1, 5, 1024, 1025])
def test_the_norm_of_a_factored_matrix_is_that_of_its_product(n):
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(n, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    left[-1] *= 100  # the largest row is the last, in a chunk of its own where n = 1025
    expected = torch.linalg.matrix_norm(left @ right.T, torch.inf)
    assert float(Factored(left, right).inf_norm()) == pytest.approx(float(expected), rel=1e-13)


@pytest.mark.parametrize("cancels", [False, True])
def test_the_bound_of_a_factored_matrix_is_its_norm_unless_entries_cancel(cancels):
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.randn(30, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    if not cancels:
        left, right = left.abs(), right.abs()
    norm, bound = Factored(left, right).inf_norm(), Factored(left, right).row_sum_bound
    assert bound > float(norm) if cancels else bound == pytest.approx(float(norm), rel=1e-14)
    dense = Dense(left @ right.T)
    assert dense.row_sum_bound == float(dense.inf_norm())
