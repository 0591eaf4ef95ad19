import copy
import inspect
import io
import math
import pickle

import pytest
import torch
from torch import nn

import idl
from idl import (
    Activation,
    ConvergenceError,
    ConvergenceWarning,
    Free,
    ImplicitFunction,
    ImplicitFunctionInf,
    ImplicitFunctionTriu,
    ImplicitModel,
    InfNormProjection,
    Newton,
    Solution,
)


def small(seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return ImplicitModel(**{"hidden_dim": 7, "input_dim": 12, "output_dim": 3, **options}).to(dtype)


def inputs(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def expected_output(model, u, phi=torch.relu, steps=3000):
    """Return what the equations of the model say, iterated in float64 from zero."""
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    A, b = model.state_matrix().detach().double(), weights.get("bias", 0.0)
    u = u.detach().double()
    x = torch.zeros(*u.shape[:-1], len(A), dtype=torch.float64)
    for _ in range(steps):
        x = phi(x @ A.T + u @ weights["B"].T + b)
    y = x @ weights["C"].T
    return y + u @ weights["D"].T if "D" in weights else y


# --- what users were promised ---------------------------------------------------------------------------------------


def test_the_signature_is_the_promised_one():
    parameters = inspect.signature(ImplicitModel).parameters
    defaults = {name: p.default for name, p in parameters.items()}
    empty = inspect.Parameter.empty
    assert defaults == {
        "hidden_dim": empty,
        "input_dim": empty,
        "output_dim": empty,
        "low_rank": False,
        "rank": None,
        "mitr": 300,
        "grad_mitr": 300,
        "tol": 3e-6,
        "grad_tol": 3e-6,
        "f": ImplicitFunctionInf,
        "activation": None,
        "kappa": None,
        "bias": False,
        "direct": True,
    }
    keyword_only = {name for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert keyword_only == {"activation", "kappa", "bias", "direct"}


def test_forward_takes_an_input_a_start_and_whether_to_return_the_solution():
    assert list(inspect.signature(ImplicitModel.forward).parameters) == ["self", "u", "x0", "return_solution"]


def test_the_call_of_the_documentation_runs():
    torch.manual_seed(0)
    model = ImplicitModel(
        hidden_dim=100,
        input_dim=3072,
        output_dim=10,
        low_rank=True,
        rank=2,
        mitr=300,
        grad_mitr=300,
        tol=3e-6,
        grad_tol=3e-6,
        f=ImplicitFunctionInf,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    u, y = inputs(8, 3, 32, 32, dtype=torch.float32), torch.arange(8)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(u), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_default_is_relu_with_the_norm_held_below_99_hundredths():
    model = small()
    assert type(model.f) is ImplicitFunctionInf
    assert repr(model.f.activation) == "relu"
    with torch.no_grad():
        model.A.mul_(1000)
    assert float(model.state_matrix().detach().abs().sum(1).max()) == pytest.approx(0.99, rel=1e-12)


# --- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("rank", [None, 1, 3, 7])
def test_the_output_is_that_of_the_equations(rank, direct, bias):
    model = small(low_rank=rank is not None, rank=rank, direct=direct, bias=bias, tol=1e-12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * inputs(*parameter.shape, seed=3))
    u = inputs(5, 12)
    torch.testing.assert_close(model(u), expected_output(model, u), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "tanh", "sigmoid", "softplus", "silu", "identity"])
def test_every_activation_is_solved(name):
    phi = {"softplus": nn.functional.softplus, "identity": lambda z: z}.get(name) or getattr(nn.functional, name)
    model = small(activation=name, kappa=0.9, tol=1e-12)
    with torch.no_grad():
        model.A.normal_(generator=torch.Generator().manual_seed(2))
    u = inputs(5, 12)
    torch.testing.assert_close(model(u), expected_output(model, u, phi), rtol=1e-8, atol=1e-8)


def test_parameters_have_the_shapes_and_names_of_the_paper():
    shapes = {name: tuple(p.shape) for name, p in small(bias=True).named_parameters()}
    assert shapes == {"A": (7, 7), "B": (7, 12), "C": (3, 7), "D": (3, 12), "bias": (7,)}
    low_rank = {name: tuple(p.shape) for name, p in small(low_rank=True, rank=2, direct=False).named_parameters()}
    assert low_rank == {"L": (7, 2), "R": (7, 2), "B": (7, 12), "C": (3, 7)}


@pytest.mark.parametrize("options", [{}, {"low_rank": True, "rank": 2}, {"bias": True}, {"hidden_dim": 1}], ids=str)
def test_a_new_model_is_finite_reproducible_and_inside_the_ball(options):
    model, again, other = small(3, **options), small(3, **options), small(4, **options)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.B, other.B)
    assert float(model.state_matrix().detach().abs().sum(1).max()) <= 0.99 + 1e-12


def test_a_low_rank_state_matrix_is_the_product_of_its_factors():
    model = small(low_rank=True, rank=2)
    with torch.no_grad():
        model.L.mul_(0.1)
    torch.testing.assert_close(model.state_matrix(), model.L @ model.R.T)
    with torch.no_grad():
        model.L.mul_(100)
    assert float(model.state_matrix().detach().abs().sum(1).max()) <= 0.99


# --- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (4, 0)], ids=str)
def test_an_output_has_the_batch_shape_of_its_input(batch):
    model = small()
    u = inputs(*batch, 12)
    y, solution = model(u, return_solution=True)
    assert y.shape == (*batch, 3)
    assert solution.x.shape == (*batch, 7)
    assert solution.residual.shape == solution.steps.shape == solution.converged.shape == batch
    torch.testing.assert_close(y, expected_output(model, u), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 4), (1, 3, 4), (3, 2, 2), (12, 1), (2, 6, 1)], ids=str)
@pytest.mark.parametrize("batch", [1, 5, 0])
def test_a_batch_of_images_gives_one_prediction_an_image(batch, shape):
    model = small()
    u = inputs(batch, *shape)
    assert model(u).shape == (batch, 3)
    assert torch.equal(model(u), model(u.reshape(batch, 12)))


def test_a_batch_of_sequences_of_images_gives_one_prediction_an_image():
    assert small()(inputs(2, 5, 3, 4)).shape == (2, 5, 3)


def test_images_of_the_documentation_are_flattened():
    torch.manual_seed(0)
    model = ImplicitModel(hidden_dim=10, input_dim=784, output_dim=4)
    assert model(torch.rand(6, 1, 28, 28)).shape == (6, 4)
    assert model(torch.rand(6, 28, 28)).shape == (6, 4)


def test_an_input_of_one_number_keeps_its_dimensions():
    model = small(input_dim=1)
    assert model(inputs(5, 1)).shape == (5, 3)
    assert model(inputs(5, 2, 1)).shape == (5, 2, 3)


def test_an_input_that_is_not_contiguous_or_is_expanded_gives_the_same():
    model, u = small(), inputs(12, 5)
    torch.testing.assert_close(model(u.T), model(u.T.contiguous()))
    expanded = inputs(1, 12).expand(4, 12)
    torch.testing.assert_close(model(expanded), model(expanded.contiguous()))


# --- start and solution ---------------------------------------------------------------------------------------------


def slow(**options):
    model = small(kappa=0.9, **options)
    with torch.no_grad():
        model.A.copy_(inputs(7, 7, seed=5).abs())
    return model


def test_a_solution_is_returned_if_asked():
    model, u = slow(), inputs(5, 12)
    y, solution = model(u, return_solution=True)
    assert isinstance(solution, Solution)
    assert torch.equal(y, model(u))
    torch.testing.assert_close(y, solution.x @ model.C.T + u @ model.D.T)
    assert bool(solution.converged.all())
    torch.testing.assert_close(solution.error_bound, solution.residual / 0.1, rtol=1e-6, atol=0)


def test_the_error_bound_bounds_the_error():
    model, u = slow(tol=1e-3), inputs(5, 12)
    _, solution = model(u, return_solution=True)
    _, exact = slow(tol=1e-13)(u, return_solution=True)
    assert bool(((solution.x - exact.x).abs().amax(1) <= solution.error_bound + 1e-12).all())


def test_a_start_at_the_solution_takes_fewer_steps_and_gives_the_same():
    model, u = slow(), inputs(5, 12)
    cold, solution = model(u, return_solution=True)
    warm, again = model(u, x0=solution.x, return_solution=True)
    assert bool((again.steps < solution.steps).all())
    torch.testing.assert_close(warm, cold, rtol=0, atol=1e-4)


def test_a_start_is_positional_too_and_may_be_any():
    model, u = slow(tol=1e-10), inputs(5, 12)
    torch.testing.assert_close(model(u, 100 * inputs(5, 7, seed=8)), model(u), rtol=0, atol=1e-7)


def test_a_start_gets_no_gradient():
    model, u = slow(), inputs(5, 12)
    x0 = inputs(5, 7, seed=8).requires_grad_()
    model(u, x0).sum().backward()
    assert x0.grad is None
    assert model.A.grad is not None


def test_a_start_has_the_batch_shape_of_the_input():
    model, u = slow(), inputs(2, 3, 12)
    _, solution = model(u, return_solution=True)
    _, again = model(u, x0=solution.x, return_solution=True)
    assert bool((again.steps < solution.steps).all())
    single, _ = model(inputs(12), x0=torch.zeros(7, dtype=torch.float64), return_solution=True)
    assert single.shape == (3,)


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"low_rank": True, "rank": 2}, {"f": ImplicitFunctionTriu}], ids=str)
def test_every_parameter_and_the_input_get_the_gradient_of_finite_differences(options):
    model = small(bias=True, activation="tanh", hidden_dim=4, input_dim=3, output_dim=2, **options)
    if options.get("f") is not ImplicitFunctionTriu:
        model = small(
            bias=True, activation="tanh", hidden_dim=4, input_dim=3, output_dim=2, tol=1e-13, grad_tol=1e-13, **options
        )
    names = [name for name, _ in model.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in model.parameters()]

    def predicted(u, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (u,))

    u = inputs(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(predicted, (u, *values), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"low_rank": True, "rank": 2}, {"bias": True}, {"f": ImplicitFunctionTriu}], ids=str
)
def test_an_empty_batch_has_an_empty_output_and_gradients_of_zero(options):
    model = small(**options)
    u = inputs(0, 12).requires_grad_()
    y = model(u)
    assert y.shape == (0, 3)
    y.sum().backward()
    assert u.grad.shape == (0, 12)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_a_row_of_zeros_in_A_has_a_finite_gradient():
    model = small()
    with torch.no_grad():
        model.A.mul_(100)
        model.A[2] = 0
    model(inputs(5, 12)).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_without_gradients_none_are_kept():
    model = small()
    with torch.no_grad():
        assert not model(inputs(5, 12)).requires_grad
    with torch.inference_mode():
        assert model(inputs(5, 12)).shape == (5, 3)


def test_evaluation_and_training_mode_give_the_same():
    model, u = small(), inputs(5, 12)
    assert torch.equal(model.train()(u), model.eval()(u))


# --- copies and files -----------------------------------------------------------------------------------------------

VARIANTS = {
    "full": {},
    "low rank": {"low_rank": True, "rank": 2},
    "bias": {"bias": True, "direct": False},
    "tanh": {"activation": "tanh", "kappa": 0.5},
    "callable": {"activation": torch.sin},
    "triangular": {"f": ImplicitFunctionTriu},
    "triangular callable": {"f": ImplicitFunctionTriu, "activation": torch.sin},
    "instance": {"f": ImplicitFunction(constraint=InfNormProjection(0.5), solver=Newton())},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_dict_makes_another_model_the_same(variant):
    model, other, u = small(0, **VARIANTS[variant]), small(1, **VARIANTS[variant]), inputs(5, 12)
    assert not torch.equal(model(u), other(u))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(model(u), other(u))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_copy_gives_the_same_and_is_independent(variant, copied):
    model, u = small(**VARIANTS[variant]), inputs(5, 12)
    before = model(u).detach()
    other = copied(model)
    assert torch.equal(other(u), before)
    with torch.no_grad():
        other.B.add_(1)
    assert torch.equal(model(u), before)


def test_a_state_dict_of_another_kind_is_refused():
    with pytest.raises(RuntimeError, match=r"Missing key.*\"A\""):
        small().load_state_dict(small(low_rank=True, rank=2).state_dict())


def test_two_models_of_different_settings_do_not_disturb_each_other():
    u = inputs(5, 12)
    tight, loose = small(kappa=0.9), small(kappa=0.1)
    with torch.no_grad():
        for model in (tight, loose):
            model.A.fill_(1)
    assert float(tight.state_matrix().detach().sum(1).max()) == pytest.approx(0.9)
    assert float(loose.state_matrix().detach().sum(1).max()) == pytest.approx(0.1)
    first = tight(u)
    loose(u)
    assert torch.equal(tight(u), first)


def test_the_representation_names_sizes_and_choices():
    text = repr(ImplicitModel(7, 12, 3, low_rank=True, rank=2, kappa=0.9, activation="tanh", bias=True, mitr=50))
    for words in ("ImplicitModel(", "7, 12, 3", "rank=2", "bias=True", "direct=True", "tanh", "InfNorm(kappa=0.9)"):
        assert words in text
    assert "max_steps=50" in text
    assert "rank" not in repr(ImplicitModel(7, 12, 3))


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 5e-3)], ids=str
)
def test_lower_precision_gives_about_the_same_with_finite_gradients(dtype, allowed):
    model, u = small(dtype=dtype), inputs(5, 12, dtype=dtype)
    y, solution = model(u, return_solution=True)
    assert y.dtype == solution.x.dtype == dtype
    assert bool(solution.converged.all())
    torch.testing.assert_close(y.double(), expected_output(model, u), rtol=allowed, atol=allowed)
    y.sum().backward()
    assert all(p.grad.dtype == dtype and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"low_rank": True, "rank": 2}], ids=str)
def test_autocast_runs_and_agrees(options):
    model, u = small(dtype=torch.float32, **options), inputs(5, 12, dtype=torch.float32)
    exact = model(u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(u)
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_the_forward_mode_jacobian_of_a_single_sample_is_that_of_the_reverse_mode():
    model, u = small(activation=torch.sin, tol=1e-13, grad_tol=1e-13), inputs(1, 12)
    torch.testing.assert_close(torch.func.jacfwd(model)(u), torch.func.jacrev(model)(u), rtol=1e-9, atol=1e-9)


# --- the implicit function ------------------------------------------------------------------------------------------


def test_a_class_gets_the_settings_of_the_model():
    f = small(mitr=50, grad_mitr=60, tol=1e-4, grad_tol=1e-5, kappa=0.7, activation="tanh").f
    assert f.solver == idl.Adaptive(atol=1e-4, max_steps=50)
    assert f.adjoint == idl.ImplicitAdjoint(idl.Adaptive(atol=0.0, rtol=1e-5, max_steps=60))
    assert f.constraint == idl.InfNorm(0.7)
    assert repr(f.activation) == "tanh"


def test_an_instance_is_used_as_it_is():
    f = ImplicitFunctionInf(kappa=0.5, activation="tanh")
    assert small(f=f).f is f


def test_a_triangular_model_is_a_feed_forward_network():
    model = small(f=ImplicitFunctionTriu)
    with torch.no_grad():
        model.A.normal_(generator=torch.Generator().manual_seed(2))
    A = model.state_matrix()
    assert torch.equal(A, A.triu(1))
    u = inputs(5, 12)
    torch.testing.assert_close(model(u), expected_output(model, u, steps=7), rtol=1e-9, atol=1e-9)


def test_a_free_model_is_not_constrained_and_reports_divergence():
    model = small(f=ImplicitFunction)
    assert model.f.constraint == Free()
    with torch.no_grad():
        model.A.fill_(0.5)
        model.B.fill_(0.1)
    with pytest.warns(ConvergenceWarning, match="5 of 5 samples") as caught:
        y = model(inputs(5, 12).abs())
    assert len(caught) == 1
    assert bool(y.isfinite().all())


def test_a_failure_is_raised_if_the_function_asks_for_it():
    model = small(f=ImplicitFunction(on_failure="raise"))
    with torch.no_grad():
        model.A.fill_(0.5)
        model.B.fill_(0.1)
    with pytest.raises(ConvergenceError):
        model(inputs(5, 12).abs())


class Soft(ImplicitFunctionInf):
    def phi(self, z):
        return torch.atan(z)


class SoftWithSlope(Soft):
    def dphi(self, z):
        return 1 / (1 + z.square())


class Scaled(ImplicitFunctionInf):
    """An activation with a setting of its own, as a user would write it."""

    def __init__(self, slope=0.5, **options):
        super().__init__(**options)
        self.slope = slope

    def phi(self, z):
        return torch.tanh(self.slope * z)


@pytest.mark.parametrize("kind", [Soft, SoftWithSlope])
@pytest.mark.parametrize("as_instance", [False, True])
def test_an_own_activation_is_a_subclass_that_overrides_phi(kind, as_instance):
    settings = {"tol": 1e-12, "grad_tol": 1e-12}
    model = small(f=kind(**settings)) if as_instance else small(f=kind, **settings)
    u = inputs(5, 12)
    y = model(u)
    torch.testing.assert_close(y, expected_output(model, u, torch.atan), rtol=1e-9, atol=1e-9)
    y.square().sum().backward()
    named = small(activation=Activation(torch.atan, lambda z: 1 / (1 + z.square()), 1.0), **settings)
    named(u).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), named.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-8, msg=name)


def test_a_subclass_with_a_setting_of_its_own_works():
    model = small(f=Scaled(slope=0.25, tol=1e-12))
    u = inputs(5, 12)
    expected = expected_output(model, u, lambda z: torch.tanh(0.25 * z))
    torch.testing.assert_close(model(u), expected, rtol=1e-9, atol=1e-9)
    assert small(f=Scaled, kappa=0.5, mitr=20).f.constraint.kappa == 0.5


def test_an_own_slope_is_used():
    calls = []

    class Counted(SoftWithSlope):
        def dphi(self, z):
            calls.append(z.shape)
            return super().dphi(z)

    small(f=Counted)(inputs(5, 12)).sum().backward()
    assert calls


def test_a_learnable_activation_gets_a_gradient():
    prelu = nn.PReLU().double()
    model = small(activation=prelu, tol=1e-13, grad_tol=1e-13)
    u = inputs(5, 12)
    model(u).square().sum().backward()

    def loss(weight):
        return float(expected_output(model, u, lambda z: torch.where(z > 0, z, weight * z)).square().sum())

    weight, eps = float(prelu.weight.detach()), 1e-6
    difference = (loss(weight + eps) - loss(weight - eps)) / (2 * eps)
    assert float(prelu.weight.grad) == pytest.approx(difference, rel=1e-5)


def test_a_learnable_activation_is_trained_saved_and_moved_with_the_model():
    prelu = nn.PReLU()
    model = ImplicitModel(7, 12, 3, activation=prelu)
    assert any(p is prelu.weight for p in model.parameters())
    assert sum(p.numel() for p in model.state_dict().values()) == 7 * 7 + 7 * 12 + 3 * 7 + 3 * 12 + 1
    model.double()
    assert prelu.weight.dtype == torch.float64
    assert model(inputs(5, 12)).dtype == torch.float64


# --- bad input ------------------------------------------------------------------------------------------------------

CONSTRUCTIONS = [
    ({"hidden_dim": 0}, ValueError, ["`hidden_dim`", "integer >= 1", "got 0"]),
    ({"input_dim": -3}, ValueError, ["`input_dim`", "integer >= 1", "got -3"]),
    ({"output_dim": 2.5}, TypeError, ["`output_dim`", "integer >= 1", "got 2.5"]),
    ({"hidden_dim": "7"}, TypeError, ["`hidden_dim`", "integer >= 1", "got '7'"]),
    ({"hidden_dim": True}, TypeError, ["`hidden_dim`", "integer >= 1", "got True"]),
    ({"low_rank": True}, ValueError, ["`rank`", "from 1 to hidden_dim", "got None"]),
    ({"low_rank": True, "rank": 0}, ValueError, ["`rank`", "integer >= 1", "got 0"]),
    ({"low_rank": True, "rank": -1}, ValueError, ["`rank`", "integer >= 1", "got -1"]),
    ({"low_rank": True, "rank": 8}, ValueError, ["`rank`", "at most hidden_dim=7", "got 8"]),
    ({"low_rank": True, "rank": 2.0}, TypeError, ["`rank`", "integer", "got 2.0"]),
    ({"rank": 2}, ValueError, ["`rank`", "low_rank=False", "got 2", "low_rank=True"]),
    ({"low_rank": "yes"}, TypeError, ["`low_rank`", "True or False", "got 'yes'"]),
    ({"kappa": 0.0}, ValueError, ["`kappa`", "strictly between 0 and 1", "got 0.0"]),
    ({"kappa": 1.0}, ValueError, ["`kappa`", "strictly between 0 and 1", "got 1.0"]),
    ({"kappa": 1}, ValueError, ["`kappa`", "strictly between 0 and 1", "got 1"]),
    ({"kappa": -0.5}, ValueError, ["`kappa`", "strictly between 0 and 1", "got -0.5"]),
    ({"kappa": math.nan}, ValueError, ["`kappa`", "strictly between 0 and 1", "got nan"]),
    ({"kappa": "0.9"}, TypeError, ["`kappa`", "real number", "got '0.9'"]),
    ({"tol": -1e-6}, ValueError, ["`tol`", ">= 0", "got -1e-06"]),
    ({"tol": math.nan}, ValueError, ["`tol`", ">= 0", "got nan"]),
    ({"grad_tol": -1.0}, ValueError, ["`grad_tol`", ">= 0", "got -1.0"]),
    ({"tol": "small"}, TypeError, ["`tol`", ">= 0", "got 'small'"]),
    ({"mitr": 0}, ValueError, ["`mitr`", "integer >= 1", "got 0"]),
    ({"grad_mitr": -2}, ValueError, ["`grad_mitr`", "integer >= 1", "got -2"]),
    ({"mitr": 10.5}, TypeError, ["`mitr`", "integer >= 1", "got 10.5"]),
    ({"activation": "rleu"}, ValueError, ["`activation`", "'relu'", "got 'rleu'"]),
    ({"activation": 3}, TypeError, ["`activation`", "a name", "got int"]),
    ({"f": "inf"}, TypeError, ["`f`", "subclass or an instance of ImplicitFunction", "got 'inf'"]),
    ({"f": nn.ReLU}, TypeError, ["`f`", "subclass or an instance of ImplicitFunction", "ReLU"]),
    ({"f": ImplicitFunction, "kappa": 0.9}, ValueError, ["`kappa`", "ImplicitFunction"]),
    ({"f": ImplicitFunctionTriu, "kappa": 0.9}, ValueError, ["`kappa`", "ImplicitFunctionTriu"]),
    ({"f": ImplicitFunctionTriu, "tol": 1e-9}, ValueError, ["`tol`", "ImplicitFunctionTriu"]),
    ({"f": ImplicitFunctionInf(), "kappa": 0.9}, ValueError, ["`kappa`", "instance", "ImplicitFunctionInf"]),
    ({"f": ImplicitFunctionInf(), "tol": 1e-9}, ValueError, ["`tol`", "instance", "ImplicitFunctionInf"]),
    ({"f": ImplicitFunctionInf(), "activation": "tanh"}, ValueError, ["`activation`", "instance"]),
    ({"f": Soft, "activation": "tanh"}, ValueError, ["`activation`", "Soft overrides phi", "got"]),
]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(("options", "kind", "words"), CONSTRUCTIONS, ids=[str(row[0]) for row in CONSTRUCTIONS])
def test_a_setting_that_does_not_fit_is_named_when_the_model_is_built(options, kind, words):
    with pytest.raises(kind) as caught:
        ImplicitModel(**{"hidden_dim": 7, "input_dim": 12, "output_dim": 3, **options})
    message = str(caught.value)
    assert [w for w in words if w not in message] == [], message


@pytest.mark.usefixtures("as_users_run_it")
def test_a_low_rank_triangular_model_is_refused_with_advice():
    with pytest.raises(TypeError, match=r"no low-rank form; use low_rank=False, or f=ImplicitFunctionInf"):
        ImplicitModel(7, 12, 3, low_rank=True, rank=2, f=ImplicitFunctionTriu)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("name", ["bias", "direct"])
def test_a_flag_is_true_or_false(name):
    with pytest.raises(TypeError, match=rf"`{name}` must be True or False; got 'False'"):
        ImplicitModel(7, 12, 3, **{name: "False"})
    with pytest.raises(TypeError, match=r"`return_solution` must be True or False; got 'no'"):
        ImplicitModel(7, 12, 3)(torch.ones(5, 12), None, "no")


@pytest.mark.parametrize("name", ["hiden_dim", "max_iter", "no_D"])
def test_a_misspelt_setting_is_refused(name):
    with pytest.raises(TypeError, match=name):
        ImplicitModel(7, 12, 3, **{name: 1})


INPUTS = [
    ("another size", lambda: torch.ones(5, 11), ValueError, ["`u`", "(..., 12)", "(5, 11)"]),
    ("images of another size", lambda: torch.ones(5, 1, 28, 28), ValueError, ["`u`", "12", "(5, 1, 28, 28)"]),
    ("a number", lambda: torch.tensor(1.0), ValueError, ["`u`", "12", "()"]),
    ("an empty sample", lambda: torch.ones(5, 0), ValueError, ["`u`", "12", "(5, 0)"]),
    ("float64", lambda: torch.ones(5, 12, dtype=torch.float64), TypeError, ["`u`", "float64", "float32"]),
    ("float16", lambda: torch.ones(5, 12, dtype=torch.float16), TypeError, ["`u`", "float16", "float32"]),
    ("integers", lambda: torch.ones(5, 12, dtype=torch.int64), TypeError, ["`u`", "int64", "u.float()"]),
    ("bytes", lambda: torch.ones(5, 12, dtype=torch.uint8), TypeError, ["`u`", "uint8", "u.float()"]),
    ("complex", lambda: torch.ones(5, 12, dtype=torch.complex64), TypeError, ["`u`", "complex64"]),
    ("another device", lambda: torch.ones(5, 12, device="meta"), ValueError, ["`u`", "meta", "cpu"]),
    ("a list", lambda: [1.0] * 12, TypeError, ["`u`", "torch.Tensor", "list", "torch.as_tensor"]),
    ("an array", lambda: torch.ones(5, 12).numpy(), TypeError, ["`u`", "torch.Tensor", "ndarray"]),
    ("nothing", lambda: None, TypeError, ["`u`", "torch.Tensor", "NoneType"]),
]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("options", [{}, {"low_rank": True, "rank": 2}, {"f": ImplicitFunctionTriu}], ids=str)
@pytest.mark.parametrize(("make", "kind", "words"), [row[1:] for row in INPUTS], ids=[row[0] for row in INPUTS])
def test_an_input_that_does_not_fit_is_named(make, kind, words, options):
    model = small(dtype=torch.float32, **options)
    with pytest.raises(kind) as caught:
        model(make())
    message = str(caught.value)
    assert [w for w in words if w not in message] == [], message


STARTS = [
    ("another size", lambda: torch.ones(5, 6), ValueError, ["`x0`", "(5, 7)", "(5, 6)"]),
    ("another batch", lambda: torch.ones(4, 7), ValueError, ["`x0`", "(5, 7)", "(4, 7)"]),
    ("a larger batch", lambda: torch.ones(2, 5, 7), ValueError, ["`x0`", "(5, 7)", "(2, 5, 7)"]),
    ("a number", lambda: torch.tensor(0.0), ValueError, ["`x0`", "(5, 7)", "()"]),
    ("float64", lambda: torch.ones(5, 7, dtype=torch.float64), TypeError, ["`x0`", "float64", "float32"]),
    ("integers", lambda: torch.ones(5, 7, dtype=torch.int64), TypeError, ["`x0`", "int64"]),
    ("another device", lambda: torch.ones(5, 7, device="meta"), ValueError, ["`x0`", "meta", "cpu"]),
    ("a list", lambda: [0.0] * 7, TypeError, ["`x0`", "torch.Tensor", "list"]),
]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(("make", "kind", "words"), [row[1:] for row in STARTS], ids=[row[0] for row in STARTS])
def test_a_start_that_does_not_fit_is_named(make, kind, words):
    model = small(dtype=torch.float32)
    with pytest.raises(kind) as caught:
        model(torch.ones(5, 12), x0=make())
    message = str(caught.value)
    assert [w for w in words if w not in message] == [], message


@pytest.mark.usefixtures("as_users_run_it")
def test_a_model_on_another_device_says_so_once():
    model = small(dtype=torch.float32).to("meta")
    with pytest.raises(ValueError, match=r"is on cpu but `A` is on meta"):
        model(torch.ones(5, 12))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_samples_that_are_not_finite_give_nan_and_the_others_their_prediction(value):
    model, u = small(dtype=torch.float32), inputs(6, 12, dtype=torch.float32)
    expected = model(u)
    u[2, 4] = value
    with pytest.warns(ConvergenceWarning, match="1 of 6 samples") as caught:
        y = model(u)
    assert len(caught) == 1
    keep = [0, 1, 3, 4, 5]
    torch.testing.assert_close(y[keep], expected[keep], rtol=0, atol=1e-5)
    assert bool(y[2].isnan().all())
