"""The gradient contract: every solver, adjoint, constraint and map, in combinations where each pair of them meets.

A new solver, adjoint, constraint or map is one entry in ``problems.py`` and inherits every test here.
"""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import oracles
from problems import ADJOINTS, BATCH, CASES, CONSTRAINTS, MAPS, SOLVERS, N, random
from tolerances import BFLOAT16, EPS, FINITE_DIFFERENCE, FLOAT32, FLOAT64, relative_error

EXACT = [case for case in CASES if case.exact]
ONE_OF_EACH = list({**{c.adjoint_name: c for c in EXACT}, **{c.map_name: c for c in EXACT}}.values())


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def over(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


def close(value, truth, tolerance=FLOAT64):
    torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance)


def loss(case):
    """A function whose second derivatives are not those of the equilibrium alone."""
    cotangent = case.cotangent

    def function(*tensors):
        x = case.solve(*tensors)
        return (cotangent * x).sum() + x.square().sum() / 2

    return function


def plain_loss(case):
    def function(*tensors):
        x = oracles.unrolled(case.plain, torch.zeros(BATCH, N), *tensors)
        return (case.cotangent * x).sum() + x.square().sum() / 2

    return function


def test_the_table_has_every_choice_of_every_axis():
    assert {c.solver_name for c in CASES} == set(SOLVERS)
    assert {c.adjoint_name for c in CASES} == set(ADJOINTS)
    assert {c.constraint_name for c in CASES} == set(CONSTRAINTS)
    assert {c.map_name for c in CASES} == set(MAPS)


@over(CASES)
def test_value_and_gradient_are_those_of_a_dense_solve(case):
    tensors = case.leaves
    x = case.solve(*tensors)
    close(x, case.x)
    gradients = torch.autograd.grad(x, tensors, case.cotangent)
    for gradient, truth in zip(gradients, case.gradient(), strict=True):
        close(gradient, truth)


# Fast mode differentiates along random directions, which a wrong entry moves.
FINITE = {"eps": EPS, "atol": FINITE_DIFFERENCE, "fast_mode": True, "check_undefined_grad": False}


@over(EXACT)
def test_first_derivatives_agree_with_finite_differences(case):
    # torch cannot nest its forward mode in a dual level, so that maps known only as functions do not offer the latter.
    assert gradcheck(case.solve_flat, case.flat, check_forward_ad=case.map.componentwise, **FINITE)


@over(EXACT)
def test_second_derivatives_agree_with_finite_differences(case):
    cotangent = case.cotangent.clone().requires_grad_()
    assert gradgradcheck(case.solve_flat, case.flat, cotangent, **FINITE)


@over(EXACT)
def test_jvp_agrees_with_finite_differences_of_the_plain_map(case):
    directions = [random(*t.shape, seed=6) for t in case.tensors]

    def plain(*tensors):
        return oracles.unrolled(case.plain, torch.zeros(BATCH, N), *tensors)

    x, moved = jvp(case.solve, tuple(case.tensors), tuple(directions))
    close(x, case.x)
    close(moved, oracles.finite_difference(plain, case.tensors, directions, EPS), FINITE_DIFFERENCE)


@over(CASES)
def test_vmap_of_the_gradient_is_a_loop_over_it(case):
    chosen = case.mapped_tensors
    scales = torch.tensor([1.0, 0.95])
    stacked = [torch.stack([s * t for s in scales]) if i in chosen else t for i, t in enumerate(case.tensors)]
    in_dims = tuple(0 if i in chosen else None for i in range(len(stacked)))

    cotangent = case.cotangent

    def pulled(*tensors):
        x, pull = torch.func.vjp(case.solve, *tensors)
        return x, pull(cotangent)

    x, gradients = vmap(pulled, in_dims)(*stacked)
    for k in range(len(scales)):
        tensors = [t[k] if i in chosen else t for i, t in enumerate(stacked)]
        close(x[k], oracles.unrolled(case.plain, torch.zeros(BATCH, N), *tensors))
        for gradient, truth in zip(gradients, case.gradient(tensors), strict=True):
            close(gradient[k], truth)


@over(CASES)
def test_jacrev_is_jacfwd_and_the_dense_jacobian(case):
    every = tuple(range(len(case.tensors)))
    reverse, forward = (jac(case.solve, every)(*case.tensors) for jac in (jacrev, jacfwd))
    basis = torch.eye(BATCH * N).reshape(-1, BATCH, N)
    rows = [case.gradient(cotangent=c) for c in basis]
    for i in every:
        truth = torch.stack([row[i] for row in rows]).reshape(BATCH, N, *case.tensors[i].shape)
        close(reverse[i], truth)
        close(forward[i], truth)


@over(ONE_OF_EACH)
def test_hessian_vector_products_are_those_of_the_unrolled_plain_map(case):
    every, tensors = tuple(range(len(case.tensors))), tuple(case.tensors)
    directions = tuple(random(*t.shape, seed=7) for t in tensors)
    _, forward_over_reverse = jvp(grad(loss(case), every), tensors, directions)
    reverse_over_forward = grad(lambda *t: jvp(loss(case), t, directions)[1], every)(*tensors)
    _, truth = torch.autograd.functional.vhp(plain_loss(case), tensors, directions)
    for i in every:
        close(forward_over_reverse[i], truth[i])
        close(reverse_over_forward[i], truth[i])


@over({c.adjoint_name: c for c in EXACT}.values())
def test_jacfwd_of_jacrev_is_the_hessian_of_the_unrolled_plain_map(case):
    def of_state(function):
        return lambda A: function(A, *case.tensors[1:])

    hessian = jacfwd(jacrev(of_state(loss(case))))(case.tensors[0])
    close(hessian, torch.autograd.functional.hessian(of_state(plain_loss(case)), case.tensors[0]))


@over(CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)], ids=str)
def test_lower_precision_agrees_with_float64_and_converges(case, dtype, tolerance):
    # The tolerance of the table is far below what these can express: a solve must end at rounding and not complain.
    tensors = [t.to(dtype).requires_grad_() for t in case.tensors]
    x = case.solve(*tensors)
    gradients = torch.autograd.grad(x, tensors, case.cotangent.to(dtype))
    rounded = [t.detach().double() for t in tensors]
    truth = oracles.unrolled(case.plain, torch.zeros(BATCH, N), *rounded)
    assert x.dtype == dtype
    assert relative_error(x, truth) < tolerance
    joined, true_joined = (
        torch.cat([g.detach().double().flatten() for g in many])
        for many in (gradients, case.gradient(rounded, case.cotangent.to(dtype).double()))
    )
    assert relative_error(joined, true_joined) < tolerance


@over([c for c in CASES if c.constraint_name == "active InfNorm" and c.exact])
def test_gradient_is_orthogonal_to_a_row_that_the_constraint_rescales(case):
    # A multiple of such a row means the same admissible matrix. A gradient that ignored the constraint would not know.
    A, *others = case.leaves
    (gradient,) = torch.autograd.grad(case.solve(A, *others), A, case.cotangent)
    close((gradient * A).sum(1), torch.zeros(N))
    assert gradient.abs().max() > 1e-4


@over([c for c in CASES if c.constraint_name == "triangular"])
def test_entries_that_the_triangle_leaves_out_get_no_gradient(case):
    A, *others = case.leaves
    (gradient,) = torch.autograd.grad(case.solve(A, *others), A, case.cotangent)
    assert torch.equal(gradient, gradient.triu(1))
