"""Models under everything that torch does to a module: modes, precisions, compilation, copies; two models at once."""

import copy
import io
import pickle

import jaxtyping
import pytest
import torch
from torch.func import functional_call, grad, vmap

from idl import (
    Activation,
    ImplicitFunction,
    ImplicitFunctionTriu,
    ImplicitModel,
    InfNorm,
    InfNormProjection,
    PhantomAdjoint,
    UnrolledAdjoint,
)
from problems import Atan, AtanWithSlope
from tolerances import BFLOAT16, FLOAT32, relative_error


def square_root(z):
    return torch.sqrt(1 + z.square()) - 1


def slope_of_square_root(z):
    return z * torch.rsqrt(1 + z.square())


OPTIONS = {
    "default": {},
    "low rank": {"low_rank": True, "rank": 2, "bias": True},
    "silu, no direct term": {"activation": "silu", "direct": False},
    "callable activation": {"activation": torch.sin},
    "own activation with slope": {"activation": Activation(square_root, slope_of_square_root, 1.0)},
    "own phi": {"f": Atan},
    "own phi and dphi": {"f": AtanWithSlope},
    "triangular": {"f": ImplicitFunctionTriu},
    "triangular, callable activation": {"f": ImplicitFunctionTriu, "activation": torch.sin},
    "projection": {"f": ImplicitFunction(constraint=InfNormProjection(0.8))},
    "unrolled": {"f": ImplicitFunction(constraint=InfNorm(0.6), adjoint=UnrolledAdjoint(50))},
    "phantom": {"f": ImplicitFunction(constraint=InfNorm(0.6), adjoint=PhantomAdjoint())},
    "PReLU": {"activation": torch.nn.PReLU()},
}
over_models = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def model_of(options):
    torch.manual_seed(0)
    return ImplicitModel(8, 5, 3, **copy.deepcopy(options))


def inputs(seed=1):
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))


def outcome(model, u=None, call=None):
    """Return the prediction, and the gradients of the input and of every parameter."""
    u = (inputs() if u is None else u.detach()).requires_grad_()
    y = (model if call is None else call)(u)
    gradients = torch.autograd.grad(y.square().sum(), [u, *model.parameters()])
    return [y.detach(), *gradients]


def assert_near(values, truths, tolerance):
    """Compare all at once: a small gradient, left over where large terms cancel, has no accuracy of its own."""
    assert [v.shape for v in values] == [t.shape for t in truths]
    assert relative_error(*(torch.cat([v.double().flatten() for v in many]) for many in (values, truths))) < tolerance


def assert_equal(these, those):
    assert len(these) == len(those)
    assert all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


@over_models
def test_eval_and_train_give_the_same(options):
    model = model_of(options)
    trained = outcome(model.train())
    assert_equal(outcome(model.eval()), trained)


@over_models
def test_a_deep_copy_gives_the_same_and_shares_nothing(options):
    model = model_of(options)
    before = outcome(model)
    other = copy.deepcopy(model)
    assert_equal(outcome(other), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    assert_equal(outcome(model), before)
    assert not torch.equal(outcome(other)[0], before[0])


@over_models
def test_a_pickled_model_comes_back_the_same(options):
    model = model_of(options)
    assert_equal(outcome(pickle.loads(pickle.dumps(model))), outcome(model))


@over_models
def test_a_saved_state_restores_the_model(options):
    model = model_of(options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = model_of(options)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_equal(outcome(other), outcome(model))


@over_models
def test_a_model_moves_to_float64_and_bfloat16_as_a_whole(options):
    model = model_of(options)
    for dtype, tolerance in ((torch.float64, FLOAT32), (torch.bfloat16, BFLOAT16)):
        rounded = copy.deepcopy(model).to(dtype).to(torch.float32)
        moved = copy.deepcopy(model).to(dtype)
        values = outcome(moved, inputs().to(dtype))
        assert {v.dtype for v in values} == {dtype}
        truth = outcome(rounded, inputs().to(dtype).float())
        assert_near(values, truth, tolerance)


@pytest.mark.parametrize("name", ["default", "low rank", "projection"])
def test_a_constraint_in_bfloat16_is_exact_to_rounding(name):
    model = model_of(OPTIONS[name]).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)  # every row is far outside the ball
    truth = copy.deepcopy(model).float().state_matrix()
    assert relative_error(model.state_matrix(), truth) < 2 * torch.finfo(torch.bfloat16).eps


@over_models
def test_autocast_agrees_with_float32_and_leaves_gradients_in_the_dtype_of_parameters(options):
    model = model_of(options)
    truth = outcome(model)
    with torch.autocast("cpu", torch.bfloat16):
        values = outcome(model)
    assert values[0].dtype == torch.bfloat16
    assert {v.dtype for v in values[1:]} == {torch.float32}
    assert_near(values, truth, BFLOAT16)


@pytest.fixture
def compiler(monkeypatch):
    """The compiler without what it remembers; it cannot trace the checks of annotations, a matter of tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch.compiler.reset()
    return torch.compile


# torch warns of itself: its compiler scripts a module on import, and looks for .grad on what a graph break returns.
quiet_compiler = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:DeprecationWarning", "ignore:The .grad attribute"
)


@over_models
@quiet_compiler
def test_a_compiled_model_gives_the_same_values_and_gradients(options, compiler):
    model = model_of(options)
    compiled = compiler(model, backend="aot_eager")
    for seed in (1, 2):  # the second call runs what the first compiled
        u = inputs(seed)
        for value, truth in zip(outcome(model, u, compiled), outcome(model, u), strict=True):
            torch.testing.assert_close(value, truth)


@quiet_compiler
def test_the_default_compiler_gives_the_same_inside_a_larger_network(compiler):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh(), ImplicitModel(8, 5, 3), torch.nn.Linear(3, 1))
    compiled = compiler(network)
    for value, truth in zip(outcome(network, None, compiled), outcome(network), strict=True):
        torch.testing.assert_close(value, truth)


@over_models
def test_per_sample_gradients_are_those_of_each_sample_alone(options):
    model = model_of(options)
    parameters = dict(model.named_parameters())

    def loss(parameters, u):
        return functional_call(model, parameters, (u,)).square().sum()

    together = vmap(grad(loss), (None, 0))(parameters, inputs())
    for i, u in enumerate(inputs()):
        for name, alone in grad(loss)(parameters, u).items():
            torch.testing.assert_close(together[name][i], alone, rtol=FLOAT32, atol=FLOAT32)


def test_two_models_with_different_options_do_not_touch_each_other():
    def first():
        return model_of({"kappa": 0.3, "tol": 1e-2, "mitr": 50, "activation": "tanh"})

    def second():
        return model_of({"kappa": 0.9, "tol": 1e-7, "grad_tol": 1e-7, "low_rank": True, "rank": 3})

    alone = [outcome(first()), outcome(second())]
    models = [first(), second()]  # both exist before either runs
    with torch.no_grad():
        models[0].A.mul_(100)
        models[1].L.mul_(100)
    norms = [float(m.state_matrix().abs().sum(1).max().detach()) for m in models]
    assert norms[0] == pytest.approx(0.3, rel=1e-5)
    assert 0.3 < norms[1] <= 0.9
    with torch.no_grad():
        models[0].A.div_(100)
        models[1].L.div_(100)
    for _ in range(2):
        for model, truth in zip(models, alone, strict=True):
            for value, true in zip(outcome(model), truth, strict=True):
                torch.testing.assert_close(value, true)
    steps = [int(m(inputs(), return_solution=True)[1].steps.max()) for m in models]
    assert steps[0] < steps[1]


def test_the_weight_of_an_activation_is_a_parameter_of_the_model():
    model = model_of(OPTIONS["PReLU"])
    assert any(p.shape == (1,) for p in model.parameters())
