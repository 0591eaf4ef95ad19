"""Every operator against the algebra of the matrix that it stands for."""

import pytest
import torch

from idl.linalg.operators import Dense, Factored, Sparse, StrictlyLower, StrictlyUpper, to_precise
from idl.linalg.sparse import compressed
from problems import random


def _dense(n, generator):
    return Dense(torch.randn(n, n, generator=generator, dtype=torch.float64) / n)


def _upper(n, generator):
    return StrictlyUpper(torch.randn(n, n, generator=generator, dtype=torch.float64).triu(1))


def _lower(n, generator):
    return StrictlyLower(torch.randn(n, n, generator=generator, dtype=torch.float64).tril(-1))


def _factored(n, generator, rank=2):
    rank = min(n, rank)
    left, right = (torch.randn(n, rank, generator=generator, dtype=torch.float64) for _ in range(2))
    return Factored(left / n, right)


OPERATORS = {"dense": _dense, "strictly upper": _upper, "strictly lower": _lower, "factored": _factored}


@pytest.fixture(params=OPERATORS)
def make(request):
    return OPERATORS[request.param]


@pytest.fixture(params=[1, 2, 6], ids="n={}".format)
def n(request):
    return request.param


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def operator(make, n, generator):
    return make(n, generator)


@pytest.fixture
def rows(n, generator):
    """Return four different tensors of three rows."""
    return torch.randn(4, 3, n, generator=generator, dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_dimension_is_that_of_the_matrix(operator, n):
    assert operator.dim == n
    assert operator.dense().shape == (n, n)


def test_the_type_and_the_tensors_rebuild_the_operator(operator):
    again = type(operator)(*operator.tensors)
    assert torch.equal(again.dense(), operator.dense())


def test_applying_is_multiplying_by_the_transpose(operator, rows):
    close(operator.apply(rows[0]), rows[0] @ operator.dense().T)


def test_applying_into_a_buffer_adds_what_is_asked_and_fills_the_buffer(operator, rows):
    out, x = torch.full_like(rows[0], torch.nan), rows[0].clone()
    assert operator.apply_into(x, out) is out
    close(out, x @ operator.dense().T)
    assert operator.apply_into(x, out, plus=rows[1]) is out
    close(out, x @ operator.dense().T + rows[1])
    assert torch.equal(x, rows[0])


def test_the_transpose_is_that_of_the_matrix(operator, rows):
    transposed = operator.transpose()
    close(transposed.dense(), operator.dense().T)
    close(transposed.apply(rows[0]), rows[0] @ operator.dense())
    assert type(transposed.transpose()) is type(operator)
    assert torch.equal(transposed.transpose().dense(), operator.dense())


def test_the_transpose_of_an_upper_triangle_is_a_lower_one(generator):
    assert isinstance(_upper(4, generator).transpose(), StrictlyLower)
    assert isinstance(_lower(4, generator).transpose(), StrictlyUpper)


def test_the_pullback_is_the_gradient_that_autograd_finds(operator, rows):
    x, v = rows[0], rows[1]
    tensors = [t.clone().requires_grad_() for t in operator.tensors]
    expected = torch.autograd.grad((v * type(operator)(*tensors).apply(x)).sum(), tensors)
    for actual, wanted in zip(operator.pullback(x, v), expected, strict=True):
        close(actual, wanted)


def derivative_along(operator, x, tangents):
    """Return the change of ``apply(x)`` by central differences, which are exact: it is at most quadratic."""
    ahead, back = (
        type(operator)(*(t + sign * d for t, d in zip(operator.tensors, tangents, strict=True))) for sign in (1, -1)
    )
    return (ahead.apply(x) - back.apply(x)) / 2


def test_the_pushforward_is_the_derivative_along_the_tangents(operator, rows, generator):
    tangents = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in operator.tensors]
    close(operator.pushforward(rows[0], tangents), derivative_along(operator, rows[0], tangents))


def test_the_pushforward_leaves_out_what_does_not_move(operator, rows, generator):
    count = len(operator.tensors)
    assert operator.pushforward(rows[0], [None] * count) is None
    for i in range(count):
        moving = torch.randn(operator.tensors[i].shape, generator=generator, dtype=torch.float64)
        alone = [moving if k == i else None for k in range(count)]
        filled = [torch.zeros_like(t) if d is None else d for t, d in zip(operator.tensors, alone, strict=True)]
        close(operator.pushforward(rows[0], alone), derivative_along(operator, rows[0], filled))


def solved_densely(operator, slope, rhs):
    A = operator.dense()
    eye = torch.eye(len(A), dtype=A.dtype)
    return torch.stack([torch.linalg.solve(eye - torch.diag(d) @ A, b) for d, b in zip(slope, rhs, strict=True)])


def test_solving_is_solving_the_dense_system_of_each_row(operator, rows):
    assert operator.can_solve
    slope, rhs = rows[0].sigmoid(), rows[1]
    torch.testing.assert_close(operator.solve(slope, rhs), solved_densely(operator, slope, rhs), rtol=1e-10, atol=1e-10)


def test_solving_no_rows_gives_no_rows(operator, n):
    none = torch.zeros(0, n, dtype=torch.float64)
    assert operator.solve(none, none).shape == (0, n)


def test_a_dense_solve_in_more_than_one_chunk_solves_every_row(generator):
    n, count = 600, 48  # chunks hold 46 rows of this size
    operator = _dense(n, generator)
    slope = torch.rand(count, n, generator=generator, dtype=torch.float64)
    rhs = torch.randn(count, n, generator=generator, dtype=torch.float64)
    v = operator.solve(slope, rhs)
    close(v - slope * operator.apply(v), rhs)


@pytest.mark.parametrize("rank", [1, 32, 33])
def test_a_factored_solve_is_right_on_both_sides_of_what_counts_as_cheap(rank, generator):
    operator = _factored(40, generator, rank)
    assert operator.solve_is_cheap == (rank <= 32)
    slope = torch.rand(3, 40, generator=generator, dtype=torch.float64)
    rhs = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(operator.solve(slope, rhs), solved_densely(operator, slope, rhs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [_dense, _factored])
def test_a_singular_system_does_not_raise(make):
    n = 3
    operator = Dense(torch.eye(n)) if make is _dense else Factored(torch.eye(n), torch.eye(n))
    v = operator.solve(torch.ones(2, n), torch.ones(2, n))
    assert v.shape == (2, n)


@pytest.mark.parametrize(("n", "affordable"), [(1024, True), (1025, False)])
def test_a_dense_solve_is_offered_up_to_a_size(n, affordable):
    assert Dense(torch.empty(n, n)).can_solve is affordable


def test_the_precise_operator_is_the_same_in_float64_and_made_once(make, n, generator):
    single = make(n, generator)
    single = type(single)(*(t.float() for t in single.tensors))
    precise = single.precise
    assert precise is single.precise
    assert type(precise) is type(single)
    assert all(torch.equal(p, t.double()) for p, t in zip(precise.tensors, single.tensors, strict=True))


def test_a_detached_operator_has_the_values_and_no_gradient(operator):
    tracked = type(operator)(*(t.clone().requires_grad_() for t in operator.tensors))
    detached = tracked.detached()
    assert type(detached) is type(operator)
    assert not any(t.requires_grad for t in detached.tensors)
    assert torch.equal(detached.dense(), operator.dense())


def test_gradients_pass_through_an_operator(operator, rows):
    tensors = tuple(t.clone().requires_grad_() for t in operator.tensors)
    assert torch.autograd.gradcheck(lambda *t: type(operator)(*t).apply(rows[0]), tensors)


def test_precise_means_float64():
    assert to_precise(torch.ones(2)).dtype == torch.float64


def test_its_norm_and_the_bounds_on_its_sums_are_those_of_the_matrix(operator):
    A = operator.dense()
    assert float(operator.inf_norm()) == pytest.approx(float(A.abs().sum(1).max()), rel=1e-13)
    exact = not isinstance(operator, Factored)  # whose bounds are those of the products of magnitudes
    for bound, sums in ((operator.row_sum_bound, A.abs().sum(1)), (operator.column_sum_bound, A.abs().sum(0))):
        assert bound >= float(sums.max()) * (1 - 1e-13)
        assert not exact or bound == pytest.approx(float(sums.max()), rel=1e-13)


def test_the_bounds_of_factors_are_those_of_the_products_of_their_magnitudes(generator):
    operator = _factored(6, generator)
    magnitudes = operator.left.abs() @ operator.right.abs().T
    assert operator.row_sum_bound == pytest.approx(float(magnitudes.sum(1).max()), rel=1e-13)
    assert operator.column_sum_bound == pytest.approx(float(magnitudes.sum(0).max()), rel=1e-13)


def test_the_sums_of_compressed_rows_are_found_without_the_dense_matrix(generator, monkeypatch):
    A = torch.randn(7, 7, generator=generator, dtype=torch.float64).relu()
    A[2], A[:, 3] = 0, 0
    operator = Sparse(compressed(A))
    monkeypatch.setattr(Sparse, "dense", lambda self: pytest.fail("made dense"))
    assert float(operator.inf_norm()) == pytest.approx(float(A.sum(1).max()), rel=1e-13)
    assert operator.row_sum_bound == pytest.approx(float(A.sum(1).max()), rel=1e-13)
    assert operator.column_sum_bound == pytest.approx(float(A.sum(0).max()), rel=1e-13)


@pytest.mark.parametrize("make", [lambda: Dense(torch.zeros(0, 0)), lambda: Factored(*torch.zeros(2, 0, 1))])
def test_a_matrix_without_units_has_sums_of_zero(make):
    assert make().row_sum_bound == make().column_sum_bound == 0


def test_its_diagonal_is_that_of_the_matrix(operator):
    close(operator.diagonal(), operator.dense().diagonal())


@pytest.mark.parametrize("rank", [32, 33])
def test_woodbury_solves_on_both_sides_of_the_rank_where_it_stops_being_cheap(rank, generator):
    operator = _factored(40, generator, rank)
    slope, rhs = (torch.rand(3, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    systems = torch.eye(40, dtype=torch.float64) - slope[:, :, None] * operator.dense()
    close(operator.solve(slope, rhs), torch.linalg.solve(systems, rhs[:, :, None])[:, :, 0])
    assert operator.solve_is_cheap == (rank == 32)


@pytest.mark.parametrize("size", [1024, 1025])
def test_a_direct_solve_is_offered_up_to_a_size_and_right_beyond(size, generator):
    operator = _dense(size, generator)
    slope, rhs = (torch.rand(1, size, generator=generator, dtype=torch.float64) for _ in range(2))
    v = operator.solve(slope, rhs)
    close(v - slope * operator.apply(v), rhs)
    assert operator.can_solve == (size == 1024)


@pytest.mark.parametrize("rank", [1, 2, 4, 5])
def test_inverted_systems_of_low_rank_solve_as_the_systems_do(rank):
    A = Factored(random(7, rank, seed=1) / 4, random(7, rank, seed=2) / 4)
    slope, rhs = torch.sigmoid(random(5, 7, seed=3)), random(5, 7, seed=4)
    solved = A.solve_by(A.inverses(slope), slope, rhs)
    torch.testing.assert_close(solved, A.solve(slope, rhs), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(solved - slope * A.apply(solved), rhs, rtol=1e-12, atol=1e-12)
    assert A.inverses_are_cheap == (rank <= 4)


@pytest.mark.parametrize("n", [1, 64, 65])
def test_the_quickest_operator_is_the_same_one(n):
    x = random(3, n, seed=0)
    for A in (Dense(random(n, n, seed=1)), Factored(random(n, 1, seed=1), random(n, 1, seed=2))):
        torch.testing.assert_close(A.quickest().apply(x), A.apply(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(A.quickest().apply_into(x, torch.empty_like(x)), A.apply(x), rtol=1e-12, atol=1e-12)
    assert isinstance(A.quickest(), Dense) == (n <= 64)
