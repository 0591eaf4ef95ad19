"""A sparse model is the dense one with zeros that stay, in every use, and multiplies in compressed rows."""

import copy
import io
import pickle
import warnings

import jaxtyping
import pytest
import torch
from torch import nn

from idl import ConvergenceWarning, ImplicitFunction, ImplicitFunctionTriu, ImplicitModel, Newton
from idl.linalg import sparse as compressed_rows
from idl.linalg.operators import Sparse
from idl.nn import SparseImplicitModel

NAMES = ("A", "B", "C", "D")


def sparse(n=30, p=40, q=20, density=0.05, dtype=torch.float32, seed=0, scale=1.0, **options):
    """A model of random weights, and the dense one that it is made of."""
    generator = torch.Generator().manual_seed(seed)
    dense = ImplicitModel(n, p, q, **options).to(dtype)
    with torch.no_grad():
        for name, matrix in dense.named_parameters():
            drawn = scale * torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
            on = torch.rand(matrix.shape, generator=generator) < (1 if name == "bias" else density)
            matrix.copy_(drawn * on)
    return SparseImplicitModel(dense), dense


def inputs(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def eager_to_compress(monkeypatch):
    """Compress matrices of any size."""
    monkeypatch.setattr(compressed_rows, "_SMALLEST", 0)


def in_use(model):
    """Return the matrices that inference multiplies with."""
    with torch.no_grad():
        return model._matrices()


# --- the same function ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 40), (150, 40), (3, 5, 40), (40,), (0, 40)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inference_in_compressed_rows_is_that_of_the_dense_model(shape, bias, direct, dtype, eager_to_compress):
    model, dense = sparse(bias=bias, direct=direct, dtype=dtype)
    u = inputs(*shape, dtype=dtype)
    with torch.no_grad():
        expected, found = dense(u, return_solution=True), model(u, return_solution=True)
    assert isinstance(in_use(model)[0], Sparse) and in_use(model)[1].layout == torch.sparse_csr
    tol = 1e-5  # the equilibrium's own tolerance
    torch.testing.assert_close(found[0], expected[0], rtol=tol, atol=tol)
    torch.testing.assert_close(found[1].x, expected[1].x, rtol=tol, atol=tol)
    assert bool(found[1].converged.all()) and float(found[1].residual.sum()) <= 3e-6 * max(1, len(u))
    assert bool((found[1].error_bound <= expected[1].error_bound + 1e-3).all())


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_rows_above_the_bound_are_rescaled_as_ever(scale, eager_to_compress):
    model, dense = sparse(scale=scale)
    torch.testing.assert_close(model.state_matrix(), dense.state_matrix(), rtol=0, atol=0)
    u = inputs(6, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(u), dense(u), rtol=1e-5, atol=1e-5 * scale)


def test_units_that_feed_themselves_are_solved_for_in_compressed_rows_too(eager_to_compress):
    _, dense = sparse(n=60, density=0.03)
    with torch.no_grad():
        dense.A.fill_diagonal_(0.9)
        model, u = SparseImplicitModel(dense), inputs(6, 40)
        first, second = (each(u, return_solution=True)[1] for each in (model, dense))
    assert isinstance(in_use(model)[0], Sparse)
    torch.testing.assert_close(first.x, second.x, rtol=1e-5, atol=2e-5)
    assert torch.equal(first.steps, second.steps)


@pytest.mark.parametrize("f", [ImplicitFunctionTriu(), ImplicitFunction(solver=Newton()), ImplicitFunction()], ids=repr)
def test_other_functions_are_kept(f, eager_to_compress):
    model, dense = sparse(f=f, scale=0.3)
    u = inputs(6, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(u), dense(u), rtol=1e-5, atol=1e-5)
    kept = isinstance(in_use(model)[0], Sparse)
    assert kept is not isinstance(f, ImplicitFunctionTriu)


def test_an_activation_without_a_derivative_sees_a_dense_matrix(eager_to_compress):
    model, dense = sparse(activation=lambda z: torch.tanh(z))
    u = inputs(6, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(u), dense(u), rtol=1e-5, atol=1e-5)


def test_a_learnable_activation_is_copied(eager_to_compress):
    dense = ImplicitModel(5, 4, 3, activation=nn.PReLU())
    model = SparseImplicitModel(dense)
    assert model.phi is not dense.phi and model.phi is model.f.activation.phi
    u = inputs(6, 4)
    with torch.no_grad():
        model.phi.weight.fill_(0.9)
        assert not torch.allclose(model(u), dense(u))
        torch.testing.assert_close(model.to_dense()(u), model(u), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(dense.phi.weight, model.phi.weight)


def test_no_warning_of_torch_reaches_the_user(eager_to_compress):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = sparse()
        with torch.no_grad():
            assert model(inputs(6, 40)).shape == (6, 20)
    assert isinstance(in_use(model)[0], Sparse)


# --- when compressed rows are used ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("density", "compresses"), [(0.05, True), (0.5, False)])
def test_dense_matrices_stay_dense(density, compresses, eager_to_compress):
    model, _ = sparse(density=density)
    A, B, C, D = in_use(model)
    assert isinstance(A, Sparse) is compresses
    assert all((matrix.layout == torch.sparse_csr) is compresses for matrix in (B, C, D))


def test_small_matrices_stay_dense():
    model, _ = sparse()
    assert all(isinstance(matrix, torch.Tensor) and matrix.layout == torch.strided for matrix in in_use(model))


def test_large_ones_do_not():
    model, dense = sparse(n=800, p=750, q=3, density=0.02)
    A, B, C, _ = in_use(model)
    assert isinstance(A, Sparse) and B.layout == torch.sparse_csr and C.layout == torch.strided
    u = inputs(70, 750)
    with torch.no_grad():
        torch.testing.assert_close(model(u), dense(u), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("context", [torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["g", "a"])
def test_what_takes_derivatives_or_casts_sees_dense_matrices(context, eager_to_compress):
    model, dense = sparse()
    u = inputs(6, 40)
    with torch.no_grad(), context():
        assert isinstance(model._matrices()[0], torch.Tensor)
        torch.testing.assert_close(model(u), dense(u), rtol=2e-2, atol=2e-2)


def test_half_precision_sees_dense_matrices(eager_to_compress):
    model, dense = sparse(dtype=torch.bfloat16)
    u = inputs(6, 40, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(model(u), dense(u), rtol=0, atol=0)


def test_forward_derivatives_under_no_grad_are_those_of_the_dense_model(eager_to_compress):
    model, dense = sparse(dtype=torch.float64)
    u = inputs(6, 40, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.func.jvp(dense, (u,), (torch.ones_like(u),))
        found = torch.func.jvp(model, (u,), (torch.ones_like(u),))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_sample_of_nan_spoils_no_other(eager_to_compress):
    model, _ = sparse(f=ImplicitFunction(on_failure="ignore"), scale=0.3)
    u = inputs(6, 40)
    with torch.no_grad():
        whole = model(u)
        u[2] = torch.nan
        found = model(u)
    assert bool(found[2].isnan().any())  # not where an output reads nothing: in compressed rows 0 times NaN is 0
    torch.testing.assert_close(found[[0, 1, 3, 4, 5]], whole[[0, 1, 3, 4, 5]], rtol=1e-5, atol=1e-5)


# --- what is cached is never stale ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.B.mul_(2),
        lambda model: setattr(model, "B", nn.Parameter(2 * model.B)),
        lambda model: setattr(model.B, "data", 2 * model.B),
        lambda model: model.load_state_dict({**model.state_dict(), "B": 2 * model.B}),
        lambda model: model.load_state_dict({**model.state_dict(), "B": 2 * model.B}, assign=True),
    ],
    ids=["in place", "another parameter", "data", "loaded", "assigned"],
)
def test_a_change_is_seen(change, eager_to_compress):
    model, _ = sparse(direct=False)
    u = inputs(6, 40)
    with torch.no_grad():
        expected = 2 * model(u)
        change(model)
        torch.testing.assert_close(model(u), expected, rtol=1e-5, atol=2e-5)


def test_a_step_of_an_optimizer_is_seen(eager_to_compress):
    model, _ = sparse()
    u = inputs(6, 40)
    with torch.no_grad():
        model(u)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(u).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(model(u), model.to_dense()(u), rtol=1e-5, atol=1e-5)


def test_changing_the_precision_is_seen(eager_to_compress):
    model, _ = sparse()
    with torch.no_grad():
        model(inputs(6, 40))
        assert model.double()(inputs(6, 40, dtype=torch.float64)).dtype == torch.float64


def test_nothing_is_made_twice(eager_to_compress):
    model, _ = sparse()
    assert in_use(model)[1] is in_use(model)[1]


def test_inference_mode_leaves_a_model_that_trains(eager_to_compress):
    model, _ = sparse()
    u = inputs(6, 40)
    with torch.inference_mode():
        model(u)
    with torch.no_grad():
        model(u)
    model(u).sum().backward()
    assert model.B.grad is not None


# --- zeros stay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=1e-2),
        lambda parameters: torch.optim.Adam(parameters, 1e-2),
        lambda parameters: torch.optim.AdamW(parameters, 1e-2, weight_decay=1e-2),
    ],
    ids=["SGD", "Adam", "AdamW"],
)
def test_training_leaves_the_support(optimizer):
    model, dense = sparse(bias=True)
    support = {name: getattr(dense, name) != 0 for name in NAMES}
    steps, u = optimizer(model.parameters()), inputs(32, 40)
    for _ in range(5):
        steps.zero_grad()
        (model(u) - 1).square().mean().backward()
        steps.step()
    for name, on in support.items():
        assert torch.equal(getattr(model, name) != 0, on)
        assert not torch.equal(getattr(model, name), getattr(dense, name))
        assert torch.equal(model.support(name), on)


def test_gradients_are_those_of_the_dense_model_on_the_support():
    model, dense = sparse(bias=True, dtype=torch.float64)
    u = inputs(8, 40, dtype=torch.float64)
    for each in (model, dense):
        each(u).square().sum().backward()
    for name in NAMES:
        expected = getattr(dense, name).grad * model.support(name)
        torch.testing.assert_close(getattr(model, name).grad, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(model.bias.grad, dense.bias.grad, rtol=1e-8, atol=1e-10)


def test_gradients_pass_gradcheck():
    model, _ = sparse(6, 4, 3, 0.5, torch.float64, f=ImplicitFunction(activation="tanh", tol=1e-12, grad_tol=1e-12))
    with torch.no_grad():
        model.A.mul_(0.3)
    names = list(NAMES)

    def output(u, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (u,))

    values = [getattr(model, name).detach().clone().requires_grad_() for name in names]
    u = inputs(3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(output, (u, *values))


def test_what_is_written_outside_the_support_takes_no_part(eager_to_compress):
    model, dense = sparse()
    u = inputs(6, 40)
    with torch.no_grad():
        for name in NAMES:
            getattr(model, name).add_(~model.support(name))
        torch.testing.assert_close(model(u), dense(u), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.state_matrix(), dense.state_matrix(), rtol=0, atol=0)
    torch.testing.assert_close(model(u), dense(u), rtol=1e-5, atol=1e-5)


def test_new_parameters_are_drawn_on_the_same_support():
    model, dense = sparse()
    model.reset_parameters()
    for name in NAMES:
        assert not bool(getattr(model, name)[getattr(dense, name) == 0].any())
        assert not torch.equal(getattr(model, name), getattr(dense, name))


# --- low rank -------------------------------------------------------------------------------------------------------


def low_rank(**options):
    return sparse(**{"low_rank": True, "rank": 3, "density": 0.3, **options})


@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("options", [{}, {"bias": True, "direct": False}, {"dtype": torch.float64}], ids=repr)
def test_a_model_of_low_rank_is_the_dense_one_with_the_supports_of_its_factors(options, scale, eager_to_compress):
    model, dense = low_rank(scale=scale, density=0.04, **options)
    u = inputs(6, 40, dtype=options.get("dtype", torch.float32))
    for name in ("L", "R", "B", "C"):
        assert torch.equal(model.support(name), getattr(dense, name) != 0)
    with pytest.raises(ValueError, match=r"`name` must be .*'L'"):
        model.support("A")
    torch.testing.assert_close(model.state_matrix(), dense.state_matrix(), rtol=0, atol=0)
    assert float(model.state_matrix().detach().abs().sum(1).max()) <= 0.99
    torch.testing.assert_close(model(u), dense(u), rtol=1e-5, atol=1e-5 * scale)
    with torch.no_grad():
        torch.testing.assert_close(model(u), dense(u), rtol=1e-5, atol=2e-5 * scale)
    A, B, C, _ = in_use(model)
    assert isinstance(A, tuple) and B.layout == C.layout == torch.sparse_csr


@pytest.mark.parametrize("bias", [True, False])
def test_factors_keep_their_zeros_while_they_train(bias, eager_to_compress):
    model, dense = low_rank(bias=bias)
    u = inputs(32, 40)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        (model(u) - 1).square().mean().backward()
        optimizer.step()
    for name in ("L", "R", "B", "C", "D"):
        assert torch.equal(getattr(model, name) != 0, getattr(dense, name) != 0)
        assert not torch.equal(getattr(model, name), getattr(dense, name))
    with torch.no_grad():
        torch.testing.assert_close(model(u), model.to_dense()(u), rtol=1e-5, atol=2e-5)
        model.reset_parameters()
    for name in ("L", "R", "B", "C", "D"):
        assert not bool(getattr(model, name)[getattr(dense, name) == 0].any())


def test_what_is_written_outside_the_support_of_a_factor_takes_no_part(eager_to_compress):
    model, dense = low_rank()
    u = inputs(6, 40)
    with torch.no_grad():
        for name in ("L", "R"):
            getattr(model, name).add_(~model.support(name))
        torch.testing.assert_close(model(u), dense(u), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(u), dense(u), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.state_matrix(), dense.state_matrix(), rtol=0, atol=0)


def test_a_change_of_a_factor_is_seen(eager_to_compress):
    model, dense = low_rank(scale=0.3)
    u = inputs(6, 40)
    with torch.no_grad():
        model(u)
        for each in (model, dense):
            each.R.mul_(0.5)
        torch.testing.assert_close(model(u), dense(u), rtol=1e-5, atol=1e-5)


def test_a_model_of_low_rank_is_saved_loaded_and_copied():
    (model, dense), (other, _) = low_rank(bias=True), low_rank(bias=True, seed=5, density=0.6)
    assert list(model.state_dict()) == list(dense.state_dict()) == ["L", "R", "B", "C", "D", "bias"]
    other.load_state_dict(model.state_dict())
    u = inputs(6, 40)
    for again in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again.support("R"), model.support("R"))
        torch.testing.assert_close(again(u), model(u), rtol=0, atol=0)
    back = model.to_dense()
    assert type(back) is ImplicitModel and back.rank == 3
    torch.testing.assert_close(back(u), model(u), rtol=0, atol=0)
    back(u).square().sum().backward()
    assert bool(back.R.grad[~model.support("R")].any())
    counts = {name: int(getattr(dense, name).count_nonzero()) for name in "LRBCD"}
    text = repr(model)
    assert "rank=3" in text
    assert "weights: " + ", ".join(f"{name} {count}" for name, count in counts.items()) in text


# --- moving, saving, copying ----------------------------------------------------------------------------------------


def test_the_state_is_that_of_the_dense_model():
    model, dense = sparse(bias=True)
    first, second = model.state_dict(), dense.state_dict()
    assert list(first) == list(second) == ["A", "B", "C", "D", "bias"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    dense.load_state_dict(first)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_brings_its_support(assign):
    model, other = sparse(seed=0)[0], sparse(seed=5, density=0.3)[0]
    buffer = io.BytesIO()
    torch.save(other.state_dict(), buffer)
    buffer.seek(0)
    inside = nn.Sequential(model)  # as a part of another module
    inside.load_state_dict({f"0.{k}": v for k, v in torch.load(buffer).items()}, assign=assign)
    for name in NAMES:
        assert torch.equal(getattr(model, name), getattr(other, name))
        assert torch.equal(model.support(name), other.support(name))
    torch.testing.assert_close(model(inputs(6, 40)), other(inputs(6, 40)), rtol=0, atol=0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_whole_and_independent(duplicate, eager_to_compress):
    model, _ = sparse(f=ImplicitFunction(), scale=0.3)
    u = inputs(6, 40)
    with torch.no_grad():
        expected = model(u)
        again = duplicate(model)
        torch.testing.assert_close(again(u), expected, rtol=0, atol=0)
        model.B.zero_()
        torch.testing.assert_close(again(u), expected, rtol=0, atol=0)


def test_making_one_changes_nothing_of_the_other():
    torch.manual_seed(3)
    expected = torch.rand(2)
    dense = sparse()[1].eval().requires_grad_(False)
    torch.manual_seed(3)
    model = SparseImplicitModel(dense)
    back = model.to_dense()
    assert torch.equal(torch.rand(2), expected)  # no random number was drawn
    assert not model.training and not back.training
    assert not any(parameter.requires_grad for parameter in (*model.parameters(), *back.parameters()))
    with torch.no_grad():
        model.A.add_(1)
        back.A.sub_(1)
    assert torch.equal(dense.A, sparse()[1].A)


def test_the_dense_model_trains_everywhere():
    model, _ = sparse()
    back = model.to_dense()
    assert type(back) is ImplicitModel
    torch.testing.assert_close(back(inputs(6, 40)), model(inputs(6, 40)), rtol=0, atol=0)
    back(inputs(6, 40)).square().sum().backward()
    assert bool(back.B.grad[~model.support("B")].any())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:The .grad attribute")
def test_a_model_can_be_compiled(monkeypatch, eager_to_compress):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which the compiler cannot trace
    torch.compiler.reset()
    model, _ = sparse()
    compiled, u = torch.compile(model, backend="eager"), inputs(3, 40)
    torch.testing.assert_close(compiled(u), model(u), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(u), model(u), rtol=1e-5, atol=1e-5)


def test_repr_counts_what_is_kept():
    dense = ImplicitModel(3, 2, 1)
    with torch.no_grad():
        dense.A.triu_(1)
        dense.D.zero_()
    assert "weights: A 3, B 6, C 3, D 0" in repr(SparseImplicitModel(dense))


def test_a_solve_in_compressed_rows_that_fails_warns_with_advice(eager_to_compress):
    model, _ = sparse(mitr=2, scale=5.0)
    with torch.no_grad():
        assert isinstance(in_use(model)[0], Sparse)
        with pytest.warns(ConvergenceWarning, match=r"max row sum of \|A\| is 0\.99"):
            model(inputs(3, 40))


# --- arguments ------------------------------------------------------------------------------------------------------


def test_the_name_of_a_matrix_must_be_one():
    model, _ = sparse(direct=False)
    for name in ("E", "D", "bias"):
        with pytest.raises(ValueError, match="`name` must"):
            model.support(name)
