import math

import pytest
import torch

from idl.activations import BY_NAME, Activation, componentwise, resolve

NAMES = ["relu", "leaky_relu", "tanh", "sigmoid", "softplus", "silu", "identity"]


@pytest.fixture(params=NAMES)
def activation(request):
    return resolve(request.param)


def grid(low=-40.0, high=40.0, count=200_001):
    """Return a fine grid; its points lie between the kinks at 0."""
    z = torch.linspace(low, high, count, dtype=torch.float64)
    return z[z.abs() > 1e-4]


def test_every_name_is_there():
    assert sorted(BY_NAME) == sorted(NAMES)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("relu", torch.relu),
        ("leaky_relu", torch.nn.functional.leaky_relu),
        ("tanh", torch.tanh),
        ("sigmoid", torch.sigmoid),
        ("softplus", lambda z: z.clamp_min(0) + torch.log1p(torch.exp(-z.abs()))),
        ("silu", torch.nn.functional.silu),
        ("identity", lambda z: z),
    ],
)
def test_a_name_means_the_function_that_torch_calls_so(name, reference):
    z = grid()
    torch.testing.assert_close(resolve(name)(z), reference(z), rtol=1e-14, atol=1e-300)


def test_the_derivative_agrees_with_finite_differences(activation):
    z, eps = grid(-12, 12), 1e-5
    difference = (activation(z + eps) - activation(z - eps)) / (2 * eps)
    # Truncation eps^2 / 6 times a third derivative below 1, rounding 1e-16 * 12 / eps.
    torch.testing.assert_close(activation.derivative(z), difference, rtol=0, atol=5e-10)


def test_the_derivative_can_be_differentiated(activation):
    z = torch.linspace(-4, 4, 24, dtype=torch.float64).requires_grad_()
    assert float(z.detach().abs().min()) > 0.1
    slope = activation.derivative(z)
    if slope.requires_grad:
        assert torch.autograd.gradcheck(activation.derivative, z)
    else:  # a piecewise linear function: the second derivative is zero
        assert torch.equal(slope, activation.derivative(z.detach() * 1.01))


def test_the_derivative_of_the_output_is_the_derivative(activation):
    if activation.derivative_of_output is None:
        pytest.skip(f"{activation} is not invertible")
    z = grid(-12, 12)
    torch.testing.assert_close(
        activation.derivative_of_output(activation(z)), activation.derivative(z), rtol=1e-9, atol=1e-12
    )


def test_the_slope_bound_holds_and_is_attained(activation):
    largest = 0.0
    for low, high in ((-40.0, 40.0), (2.3, 2.5), (-2.5, -2.3), (-1e-2, 1e-2)):  # silu is steepest at 2.39936
        largest = max(largest, float(activation.derivative(grid(low, high)).abs().max()))
    assert largest <= activation.lipschitz
    assert largest >= activation.lipschitz - 1e-5


def test_no_chord_is_steeper_than_the_slope_bound(activation):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 100_000, generator=generator, dtype=torch.float64) * 5
    assert bool(((activation(a) - activation(b)).abs() <= activation.lipschitz * (a - b).abs() + 1e-15).all())


def test_applying_in_place_gives_the_same(activation):
    z = grid()
    assert torch.equal(activation.apply_(z.clone()), activation(z))


def test_applying_out_of_place_leaves_the_argument_alone(activation):
    z = grid()
    before = z.clone()
    activation(z), activation.derivative(z)
    assert torch.equal(z, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_values_and_derivatives_keep_dtype_and_shape(activation, dtype):
    z = torch.tensor([[-1.0, 0.0, 2.0]], dtype=dtype)
    results = [activation(z), activation.derivative(z)]
    if activation.derivative_of_output is not None:
        results.append(activation.derivative_of_output(activation(z)))
    assert all(r.dtype == dtype and r.shape == z.shape for r in results)


def test_large_arguments_give_finite_values_and_derivatives(activation):
    z = torch.tensor([-1e4, -750.0, -100.0, 100.0, 750.0, 1e4], dtype=torch.float64)
    assert bool(activation(z).isfinite().all())
    slope = activation.derivative(z)
    assert bool(slope.isfinite().all()) and bool((slope.abs() <= activation.lipschitz).all())


@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_the_slope_at_the_kink_is_one_of_its_one_sided_slopes_in_both_forms(name):
    zero = torch.zeros(1)
    activation = resolve(name)
    slope = float(activation.derivative(zero))
    assert min(abs(slope - s) for s in (1.0, 0.0 if name == "relu" else 0.01)) < 1e-7
    assert float(activation.derivative_of_output(activation(zero))) == slope


def test_an_activation_prints_its_name(activation):
    assert repr(activation) == activation.name
    assert resolve(activation.name) is activation


def test_an_activation_is_returned_as_it_is():
    own = Activation(torch.sin, torch.cos, 1.0, name="sine")
    assert resolve(own) is own
    assert repr(own) == "sine"


def test_a_callable_is_known_by_its_values_only():
    own = resolve(torch.sin)
    assert own.derivative is None and own.lipschitz is None and own.derivative_of_output is None
    assert repr(own) == "sin"
    z = torch.linspace(-1, 1, 5)
    assert torch.equal(own(z), torch.sin(z)) and torch.equal(own.apply_(z.clone()), torch.sin(z))


def test_a_module_is_named_by_its_class():
    assert repr(resolve(torch.nn.PReLU())) == "PReLU"


@pytest.mark.parametrize("name", ["rleu", "ReLU", ""])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError) as caught:
        resolve(name)
    message = str(caught.value)
    assert "`activation`" in message and repr(name) in message
    assert all(repr(known) in message for known in NAMES)


@pytest.mark.parametrize("value", [3, None, [], torch.ones(1)])
def test_what_is_no_activation_is_refused(value, as_users_run_it):
    with pytest.raises(TypeError, match=rf"`activation` must be .*; got {type(value).__name__}\."):
        resolve(value)


def test_a_componentwise_callable_gets_its_derivative_from_autograd():
    own = componentwise(resolve(torch.sin))
    z = torch.linspace(-3, 3, 20, dtype=torch.float64).reshape(4, 5)
    torch.testing.assert_close(own.derivative(z), torch.cos(z), rtol=0, atol=1e-15)
    assert own.name == "sin"


def test_the_largest_slope_of_silu_is_the_root_of_its_second_derivative():
    # silu'' = s(1-s)(2 + z(1-2s)) is zero where z tanh(z/2) = 2.
    z = 2.4
    for _ in range(50):
        t = math.tanh(z / 2)
        z -= (z * t - 2) / (t + z * (1 - t * t) / 2)
    s = 1 / (1 + math.exp(-z))
    exact = s * (1 + z * (1 - s))
    assert exact <= resolve("silu").lipschitz <= exact + 1e-6
