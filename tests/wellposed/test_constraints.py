"""Every constraint: what it admits is admissible, and what is admissible already is left as it is."""

from dataclasses import dataclass

import pytest
import torch

from idl import Free, ImplicitFunction, ImplicitModel, InfNorm, InfNormProjection, StrictlyTriangular
from idl.linalg.operators import StrictlyUpper
from idl.wellposed import AbstractConstraint, Dense, Factored

BALLS = [InfNorm, InfNormProjection]
KAPPAS = [0.01, 0.5, 0.9, 0.99, 0.9999]
LIPSCHITZ = [0.25, 1.0, 1.0998395, 3.0]
DTYPES = [torch.float32, torch.float64]


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mixed_rows(n, dtype, seed=0):
    """Return a matrix with rows far inside the ball, near its boundary and far outside."""
    A = drawn(n, n, seed=seed)
    sizes = torch.logspace(-3, 3, n, dtype=torch.float64)
    return (A * sizes[:, None] / A.abs().sum(1, keepdim=True)).to(dtype)


def largest_row_sum(matrix):
    """Return the exact norm: sums of float32 numbers are right to rounding of float64."""
    return float(matrix.dense().double().abs().sum(1).max())


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lipschitz", LIPSCHITZ)
@pytest.mark.parametrize("kappa", KAPPAS)
def test_the_largest_row_sum_times_the_slope_is_at_most_kappa(ball, dtype, lipschitz, kappa):
    for n in (1, 7, 100):
        admitted = ball(kappa).admit(mixed_rows(n, dtype), lipschitz)
        assert isinstance(admitted, Dense)
        assert admitted.matrix.dtype == dtype
        # Rows that were left as they are may exceed kappa by the rounding of their own float32 or float64 sum.
        assert max(1.0, lipschitz) * largest_row_sum(admitted) <= kappa * (1 + 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("n", [1, 3, 100, 1000])
@pytest.mark.parametrize("kappa", KAPPAS)
def test_rows_brought_into_the_ball_are_strictly_below_kappa_in_float32(ball, n, kappa):
    A = drawn(n, n, dtype=torch.float32) * 10
    if n == 1:
        A = A.abs() + 1
    admitted = ball(kappa).admit(A, 1.0)
    assert largest_row_sum(admitted) <= kappa
    assert float(admitted.matrix.abs().sum(1).min()) >= kappa * (1 - 1e-5), "rows are brought to the sphere, no further"


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_matrix_inside_the_ball_is_returned_bit_by_bit(ball, dtype):
    A = drawn(50, 50, dtype=dtype)
    sums = 0.94 * torch.rand(50, 1, generator=torch.Generator().manual_seed(1), dtype=dtype)
    A = A * sums / A.abs().sum(1, keepdim=True)
    assert torch.equal(ball(0.95).admit(A, 1.0).matrix, A)


@pytest.mark.parametrize("ball", BALLS)
def test_rows_inside_the_ball_are_untouched_by_those_outside(ball):
    A = mixed_rows(40, torch.float32)
    inside = A.double().abs().sum(1) < 0.9
    assert 0 < int(inside.sum()) < 40
    assert torch.equal(ball(0.9).admit(A, 1.0).matrix[inside], A[inside])


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_admitting_twice_is_admitting_once(ball, dtype):
    once = ball(0.9).admit(mixed_rows(40, dtype), 1.0).matrix
    assert torch.equal(ball(0.9).admit(once, 1.0).matrix, once)


def test_rescaling_keeps_the_direction_of_each_row():
    A = mixed_rows(20, torch.float64)
    admitted = InfNorm(0.9).admit(A, 1.0).matrix
    cosine = torch.nn.functional.cosine_similarity(A, admitted)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-12, atol=0)


def test_no_admissible_row_is_nearer_than_the_projected_one():
    A = mixed_rows(20, torch.float64)
    nearest = (InfNormProjection(0.9).admit(A, 1.0).matrix - A).norm(dim=1)
    for seed in range(50):
        other = InfNorm(0.9).admit(A + drawn(20, 20, seed=seed) * 0.1, 1.0).matrix
        assert bool(((other - A).norm(dim=1) >= nearest - 1e-12).all())


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lipschitz", LIPSCHITZ)
def test_low_rank_factors_are_held_so_that_their_product_is_admissible(rank, dtype, lipschitz):
    left, right = drawn(30, rank, seed=1, dtype=dtype), drawn(30, rank, seed=2, dtype=dtype)
    left = left * torch.logspace(-4, 2, 30, dtype=torch.float64).to(dtype)[:, None]
    admitted = InfNorm(0.95).admit_factors(left, right, lipschitz)
    assert isinstance(admitted, Factored)
    product = admitted.left.double() @ admitted.right.double().T
    assert max(1.0, lipschitz) * float(product.abs().sum(1).max()) <= 0.95 * (1 + 4 * torch.finfo(dtype).eps)


def test_the_bound_on_low_rank_rows_is_attained_at_rank_one():
    admitted = InfNorm(0.95).admit_factors(drawn(20, 1, seed=1) * 10, drawn(20, 1, seed=2), 1.0)
    sums = admitted.dense().abs().sum(1)
    torch.testing.assert_close(sums, torch.full_like(sums, 0.95), rtol=1e-12, atol=0)


def test_low_rank_factors_inside_the_ball_are_returned_bit_by_bit():
    left, right = drawn(20, 2, seed=1, dtype=torch.float32) * 1e-3, drawn(20, 2, seed=2, dtype=torch.float32)
    admitted = InfNorm(0.95).admit_factors(left, right, 1.0)
    assert torch.equal(admitted.left, left) and torch.equal(admitted.right, right)


def test_the_factor_on_the_right_is_never_changed():
    left, right = drawn(20, 2, seed=1) * 100, drawn(20, 2, seed=2)
    assert torch.equal(InfNorm(0.95).admit_factors(left, right, 1.0).right, right)


@pytest.mark.parametrize("n", [1, 2, 17])
def test_a_triangular_matrix_is_strictly_so_and_keeps_what_lies_above(n):
    A = drawn(n, n)
    admitted = StrictlyTriangular().admit(A, 1.0)
    assert isinstance(admitted, StrictlyUpper)
    for i in range(n):
        for j in range(n):
            assert float(admitted.matrix[i, j]) == (float(A[i, j]) if j > i else 0.0)


def test_what_is_free_is_returned_as_it_is():
    A, left, right = drawn(4, 4), drawn(4, 2), drawn(4, 2, seed=1)
    assert Free().admit(A, 1.0).matrix is A
    assert Free().admit_factors(left, right, 1.0) == Factored(left, right)


@pytest.mark.parametrize("constraint", [InfNormProjection(), StrictlyTriangular()], ids=repr)
def test_a_constraint_without_a_low_rank_form_says_what_to_do(constraint):
    with pytest.raises(TypeError, match=r"has no low-rank form; use low_rank=False, or f=ImplicitFunctionInf"):
        constraint.admit_factors(drawn(4, 2), drawn(4, 2), 1.0)


@pytest.mark.parametrize("ball", BALLS)
def test_zero_rows_stay_zero_and_have_a_finite_gradient(ball):
    A = torch.zeros(3, 3, requires_grad=True)
    mixed = A + torch.tensor([[0.0], [0.1], [5.0]])
    admitted = ball(0.9).admit(mixed, 1.0).matrix
    assert torch.equal(admitted[0], torch.zeros(3))
    admitted.sum().backward()
    assert bool(A.grad.isfinite().all())


@pytest.mark.parametrize("ball", BALLS)
def test_the_gradient_passes_through_the_constraint(ball):
    A = mixed_rows(5, torch.float64, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda A: ball(0.9).admit(A, 1.0).matrix, A)


def test_the_gradient_passes_through_the_low_rank_constraint():
    left = (drawn(5, 2, seed=1) * torch.tensor([0.01, 0.1, 1, 2, 5])[:, None]).requires_grad_()
    right = drawn(5, 2, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda L, R: InfNorm(0.9).admit_factors(L, R, 1.0).dense(), (left, right))


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("kappa", [0.0, 1.0, -0.5, 1.5, float("nan"), float("inf")])
def test_a_kappa_that_is_not_between_0_and_1_is_refused(ball, kappa):
    with pytest.raises(ValueError, match=r"`kappa` must lie strictly between 0 and 1; got .* A map contracts"):
        ball(kappa)


@pytest.mark.parametrize("ball", BALLS)
def test_constraints_with_equal_fields_are_equal_and_print_them(ball):
    assert ball(0.9) == ball(0.9) != ball(0.8)
    assert hash(ball(0.9)) == hash(ball(0.9))
    assert repr(ball(0.9)) == f"{ball.__name__}(kappa=0.9)"
    assert ball(0.9).contraction == 0.9


def test_what_does_not_contract_for_certain_claims_no_contraction():
    assert Free().contraction is None
    assert StrictlyTriangular().contraction is None
    assert InfNorm(0.9) != InfNormProjection(0.9)


def test_a_constraint_is_to_be_subclassed_and_cannot_be_built():
    with pytest.raises(TypeError, match="abstract"):
        AbstractConstraint()


@dataclass(frozen=True)
class SymmetricInfNorm(AbstractConstraint):
    """Symmetric matrices with row sums of at most a half, as a user would write it."""

    contraction = 0.5

    def admit(self, A, lipschitz):
        symmetric = A + A.T
        return Dense(symmetric * (0.5 / max(1.0, lipschitz) / symmetric.abs().sum(1).max()))


@pytest.mark.parametrize("activation", ["relu", "tanh", "silu"])
def test_a_constraint_of_the_user_works_in_an_implicit_function(activation):
    f = ImplicitFunction(constraint=SymmetricInfNorm(), activation=activation, tol=1e-12)
    A, B, u = drawn(6, 6).requires_grad_(), drawn(6, 3, seed=1), drawn(4, 3, seed=2)
    admitted = f.state_matrix(A).dense()
    assert torch.equal(admitted, admitted.T)
    solution = f.solution(A, B, u)
    assert bool(solution.converged.all())
    image = f.phi(solution.x @ admitted.T + u @ B.T)
    torch.testing.assert_close(solution.x, image, rtol=0, atol=1e-11)
    torch.testing.assert_close(solution.error_bound, solution.residual / 0.5)
    solution.x.square().sum().backward()
    assert bool(A.grad.isfinite().all()) and bool((A.grad != 0).any())


def test_a_constraint_of_the_user_without_a_low_rank_form_refuses_factors():
    f = ImplicitFunction(constraint=SymmetricInfNorm())
    with pytest.raises(TypeError, match="has no low-rank form"):
        f((drawn(6, 2), drawn(6, 2)), drawn(6, 3), drawn(4, 3))


def test_a_constraint_of_ones_own_returns_a_matrix_by_its_public_name():
    @dataclass(frozen=True)
    class Symmetric(AbstractConstraint):
        kappa: float
        contraction = None

        def admit(self, A, lipschitz):
            symmetric = (A + A.mT) / 2
            return Dense(symmetric * self.kappa / torch.linalg.matrix_norm(symmetric, 2).clamp_min(self.kappa))

    torch.manual_seed(0)
    model = ImplicitModel(6, 3, 2, f=ImplicitFunction(activation="tanh", constraint=Symmetric(0.9)))
    A = model.state_matrix()
    torch.testing.assert_close(A, A.mT)
    _, solution = model(torch.randn(4, 3), return_solution=True)
    assert bool(solution.converged.all())
