import pytest
import torch

from idl.linalg.krylov import gcr


def systems(rows, n, seed, size=0.9):
    """Return matrices ``I - J`` with ``|J|`` of row sums ``size``, one a row, and right-hand sides; float64."""
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(rows, n, n, generator=generator, dtype=torch.float64)
    J = J * size / J.abs().sum(2, keepdim=True)
    return torch.eye(n, dtype=torch.float64) - J, torch.randn(rows, n, generator=generator, dtype=torch.float64)


def applied(M):
    return lambda v: torch.einsum("rij,rj->ri", M, v)


@pytest.mark.parametrize("n", [1, 2, 5, 12])
@pytest.mark.parametrize("seed", [0, 1])
def test_as_many_steps_as_unknowns_solve_every_row(n, seed):
    M, rhs = systems(4, n, seed)
    v, reduction, products = gcr(applied(M), rhs, rtol=1e-12, max_steps=n)
    torch.testing.assert_close(v, torch.linalg.solve(M, rhs), rtol=1e-9, atol=1e-9)
    assert bool((reduction <= 1e-9).all())
    assert 1 <= products <= n


def test_the_reduction_is_that_of_the_true_residual():
    M, rhs = systems(4, 30, 0)
    for steps in (1, 3, 7):
        v, reduction, products = gcr(applied(M), rhs, rtol=0.0, max_steps=steps)
        assert products == steps
        true = (rhs - applied(M)(v)).norm(dim=1) / rhs.norm(dim=1)
        torch.testing.assert_close(reduction, true, rtol=1e-9, atol=1e-12)


def test_each_row_minimises_its_residual_over_its_krylov_space():
    M, rhs = systems(3, 10, 2)
    steps = 4
    _, reduction, _ = gcr(applied(M), rhs, rtol=0.0, max_steps=steps)
    for matrix, b, least in zip(M, rhs, reduction, strict=True):
        basis = torch.stack([torch.linalg.matrix_power(matrix, k) @ b for k in range(steps)], 1)
        c = torch.linalg.lstsq(matrix @ basis, b[:, None]).solution
        best = (b - (matrix @ basis @ c)[:, 0]).norm() / b.norm()
        assert float(least) == pytest.approx(float(best), rel=1e-6)


def test_it_stops_once_every_row_has_reached_the_tolerance():
    M, rhs = systems(5, 40, 3, size=0.3)
    _, reduction, products = gcr(applied(M), rhs, rtol=1e-2, max_steps=40)
    assert bool((reduction <= 1e-2).all())
    assert products < 10


def test_the_identity_takes_one_product():
    rhs = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v, _, products = gcr(lambda v: v, rhs, rtol=1e-10, max_steps=6)
    assert products == 1
    torch.testing.assert_close(v, rhs, rtol=1e-14, atol=1e-14)


def test_a_zero_right_hand_side_gives_zero():
    M, rhs = systems(3, 6, 4)
    rhs[1] = 0
    v, _, _ = gcr(applied(M), rhs, rtol=1e-10, max_steps=6)
    torch.testing.assert_close(v, torch.linalg.solve(M, rhs), rtol=1e-8, atol=1e-8)
    assert torch.equal(v[1], torch.zeros(6, dtype=torch.float64))


def test_rows_that_are_not_finite_do_not_disturb_the_others_nor_prolong_the_solve():
    M, rhs = systems(4, 8, 5)
    clean, _, products = gcr(applied(M), rhs, rtol=1e-8, max_steps=8)
    spoilt = rhs.clone()
    spoilt[2, 0] = torch.nan
    v, _, also = gcr(applied(M), spoilt, rtol=1e-8, max_steps=8)
    keep = [0, 1, 3]
    torch.testing.assert_close(v[keep], clean[keep], rtol=1e-6, atol=1e-6)
    assert also <= products


def test_a_singular_system_ends_without_raising_and_says_how_far_it_came():
    M, rhs = systems(3, 5, 6)
    M[1] = 0
    v, reduction, products = gcr(applied(M), rhs, rtol=1e-10, max_steps=20)
    keep = [0, 2]
    torch.testing.assert_close(v[keep], torch.linalg.solve(M[keep], rhs[keep]), rtol=1e-8, atol=1e-8)
    assert float(reduction[1]) == pytest.approx(1.0)
    assert products <= 20


def test_no_rows_are_no_error():
    v, reduction, _ = gcr(lambda v: v, torch.zeros(0, 4), rtol=1e-3, max_steps=3)
    assert v.shape == (0, 4) and reduction.shape == (0,)


def test_float32_reaches_what_rounding_permits():
    M, rhs = systems(4, 20, 7)
    v, _, _ = gcr(applied(M.float()), rhs.float(), rtol=1e-6, max_steps=20)
    assert v.dtype == torch.float32
    torch.testing.assert_close(v.double(), torch.linalg.solve(M, rhs), rtol=1e-4, atol=1e-4)
