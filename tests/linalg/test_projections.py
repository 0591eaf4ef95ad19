import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from idl.linalg.projections import l1_ball_threshold, project_rows_l1

MATRICES = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.floats(-1e3, 1e3, allow_nan=False, allow_subnormal=False).map(lambda x: round(x, 6)),
)
RADII = st.floats(1e-2, 1e2)
examples = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def projected_by_sorting(a, radius):
    """Return the projection of one row by the textbook formula: sort, then the largest support that is consistent."""
    magnitudes = np.abs(a)
    if magnitudes.sum() <= radius:
        return a
    descending = np.sort(magnitudes)[::-1]
    thresholds = (np.cumsum(descending) - radius) / np.arange(1, len(a) + 1)
    tau = thresholds[np.nonzero(descending > thresholds)[0][-1]]
    return np.sign(a) * np.maximum(magnitudes - tau, 0)


@examples
@given(A=MATRICES, radius=RADII)
def test_a_projection_agrees_with_the_sorting_formula(A, radius):
    expected = np.stack([projected_by_sorting(row, radius) for row in A])
    # Sums of up to 12 numbers of size 1e3: rounding of about 12e3 * 2.2e-16, here with room of 100.
    np.testing.assert_allclose(project_rows_l1(torch.from_numpy(A), radius).numpy(), expected, rtol=0, atol=3e-10)


@examples
@given(A=MATRICES, radius=RADII)
def test_a_projection_lies_in_the_ball(A, radius):
    sums = project_rows_l1(torch.from_numpy(A), radius).abs().sum(1)
    assert bool((sums <= radius + 3e-10).all())


@examples
@given(A=MATRICES, radius=RADII)
def test_projecting_twice_is_projecting_once(A, radius):
    once = project_rows_l1(torch.from_numpy(A), radius)
    torch.testing.assert_close(project_rows_l1(once, radius), once, rtol=0, atol=3e-10)


@examples
@given(A=MATRICES, radius=RADII)
def test_no_point_of_the_ball_is_nearer_than_the_projection(A, radius):
    A = torch.from_numpy(A)
    P = project_rows_l1(A, radius)
    # P is nearest if and only if <A - P, Y - P> <= 0 for all Y of the ball; the largest <A - P, Y> is at a corner.
    gap = radius * (A - P).abs().amax(1) - ((A - P) * P).sum(1)
    assert bool((gap <= 1e-9 * (1 + radius) * (1 + A.abs().sum(1))).all())


@examples
@given(A=MATRICES, radius=RADII)
def test_rows_inside_the_ball_are_returned_bit_by_bit(A, radius):
    A = torch.from_numpy(A)
    inside = A.abs().sum(1) <= radius
    assert torch.equal(project_rows_l1(A, radius)[inside], A[inside])


@examples
@given(A=MATRICES, radius=RADII)
def test_the_threshold_solves_its_equation(A, radius):
    magnitudes = torch.from_numpy(A).abs()
    tau = l1_ball_threshold(magnitudes, radius)
    assert tau.shape == (len(A), 1) and bool((tau >= 0).all())
    rest = (magnitudes - tau).clamp_min(0).sum(1)
    expected = magnitudes.sum(1).clamp_max(radius)
    torch.testing.assert_close(rest, expected, rtol=0, atol=3e-10)


def test_equal_entries_are_projected_to_equal_entries():
    row = torch.tensor([[2.0, -2.0, 2.0, 2.0]])
    assert torch.equal(project_rows_l1(row, 1.0), row / 8)


def test_a_single_entry_is_clipped():
    projected = project_rows_l1(torch.tensor([[3.0], [-3.0], [0.5], [0.0]]), 1.0)
    assert torch.equal(projected, torch.tensor([[1.0], [-1.0], [0.5], [0.0]]))


def test_a_zero_matrix_stays_zero():
    assert torch.equal(project_rows_l1(torch.zeros(3, 4), 0.5), torch.zeros(3, 4))


@pytest.mark.parametrize("n", [1, 7, 1000])
def test_the_projection_holds_in_float32_for_rows_of_any_length(n):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(20, n, generator=generator) * torch.logspace(-6, 6, 20)[:, None]
    P = project_rows_l1(A, 0.99)
    exact = np.stack([projected_by_sorting(row, 0.99) for row in A.double().numpy()])
    # tau comes from a sum of float32 numbers up to 1e6 times the radius, so entries are right to eps * |a|.
    allowed = 1e-6 * A.double().abs().amax(1, keepdim=True).clamp_min(1)
    assert bool(((P.double() - torch.from_numpy(exact)).abs() <= allowed).all())


def test_the_gradient_of_a_projection_agrees_with_finite_differences():
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(6, 5, generator=generator, dtype=torch.float64) * torch.tensor([0.1, 0.2, 1, 2, 5, 9.0])[:, None]
    tau = l1_ball_threshold(A.abs(), 1.0)
    assert float((A.abs() - tau).abs().min()) > 1e-3, "an entry is at its kink"
    assert bool((tau > 0).any()) and bool((tau == 0).any()), "rows of both kinds are wanted"
    A.requires_grad_()
    assert torch.autograd.gradcheck(lambda A: project_rows_l1(A, 1.0), A)
    assert torch.autograd.gradgradcheck(lambda A: project_rows_l1(A, 1.0), A)


def test_the_gradient_of_a_row_on_the_boundary_is_finite():
    A = torch.tensor([[0.5, -0.5, 0.0], [0.0, 0.0, 0.0], [2.0, 2.0, 0.0]], requires_grad=True)
    project_rows_l1(A, 1.0).sum().backward()
    assert bool(A.grad.isfinite().all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_visible_and_leaves_the_others_alone(value):
    A = torch.tensor([[2.0, 1.0], [value, 1.0], [0.1, 0.2]])
    P = project_rows_l1(A, 1.0)
    assert torch.equal(P[[0, 2]], torch.tensor([[1.0, 0.0], [0.1, 0.2]]))
    assert not bool(P[1].isfinite().all())


@pytest.mark.parametrize("size", [1e8, 1e16, 1e30])
def test_rows_far_outside_the_ball_are_projected_too(size):
    A = torch.tensor([[size, 0.0, -0.5 * size], [size, size, -size], [0.1, 0.2, 0.3]], dtype=torch.float64)
    expected = torch.tensor([[0.9, 0, 0], [0.3, 0.3, -0.3], [0.1, 0.2, 0.3]], dtype=torch.float64)
    torch.testing.assert_close(project_rows_l1(A, 0.9), expected, rtol=1e-9, atol=0)
