import copy
import inspect

import pytest
import torch

from idl import (
    Activation,
    Adaptive,
    Anderson,
    BackSubstitution,
    Free,
    ImplicitAdjoint,
    ImplicitFunction,
    ImplicitFunctionInf,
    ImplicitFunctionTriu,
    InfNorm,
    InfNormProjection,
    Newton,
    PhantomAdjoint,
    Picard,
    StrictlyTriangular,
    equilibrium,
)
from idl.linalg.operators import Dense, Factored, StrictlyUpper

FUNCTIONS = [ImplicitFunction, ImplicitFunctionInf, ImplicitFunctionTriu]


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def tensors():
    """Return ``A, B, u, bias``; the row sums of ``A`` are near 0.3."""
    return drawn(6, 6, seed=0) / 16, drawn(6, 4, seed=1), drawn(5, 4, seed=2), drawn(6, seed=3)


def test_options_are_keyword_only_and_defaults_are_the_promised_ones():
    for kind in FUNCTIONS:
        parameters = inspect.signature(kind).parameters.values()
        assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters)
    defaults = {name: p.default for name, p in inspect.signature(ImplicitFunctionInf).parameters.items()}
    promised = {"mitr": 300, "grad_mitr": 300, "tol": 3e-6, "grad_tol": 3e-6, "kappa": 0.99, "on_failure": "warn"}
    assert promised.items() <= defaults.items()


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_function_is_the_equilibrium_of_the_admissible_matrix(kind, tensors):
    A, B, u, bias = tensors
    f = kind(activation="tanh")
    expected = equilibrium(f.state_matrix(A), B, u, bias=bias, phi="tanh", solver=f.solver)
    assert torch.equal(f(A, B, u, bias=bias), expected.x)
    solution = f.solution(A, B, u, bias=bias)
    assert torch.equal(solution.x, expected.x) and torch.equal(solution.steps, expected.steps)


def test_names_of_the_specification_are_those_of_solver_and_adjoint():
    f = ImplicitFunction(mitr=10, grad_mitr=20, tol=1e-3, grad_tol=1e-4)
    assert f.solver == Adaptive(atol=1e-3, rtol=0.0, max_steps=10)
    assert f.adjoint == ImplicitAdjoint(Adaptive(atol=0.0, rtol=1e-4, max_steps=20))


def test_solver_adjoint_and_constraint_may_be_given():
    f = ImplicitFunction(solver=Newton(), adjoint=PhantomAdjoint(), constraint=InfNormProjection(0.5))
    assert (f.solver, f.adjoint, f.constraint) == (Newton(), PhantomAdjoint(), InfNormProjection(0.5))


def test_the_defaults_are_relu_and_the_constraint_of_the_name():
    assert [kind().constraint for kind in FUNCTIONS] == [Free(), InfNorm(0.99), StrictlyTriangular()]
    assert all(repr(kind().activation) == "relu" for kind in FUNCTIONS)
    assert ImplicitFunctionTriu().solver == BackSubstitution()


def test_the_state_matrix_is_the_constrained_parameter():
    A = drawn(6, 6, seed=0) * 10
    assert torch.equal(ImplicitFunction().state_matrix(A).dense(), A)
    assert isinstance(ImplicitFunctionInf().state_matrix(A), Dense)
    assert float(ImplicitFunctionInf(kappa=0.5).state_matrix(A).dense().abs().sum(1).max()) <= 0.5
    assert isinstance(ImplicitFunctionTriu().state_matrix(A), StrictlyUpper)
    assert isinstance(ImplicitFunctionInf().state_matrix((A[:, :2], A[:, :2])), Factored)


def test_a_steep_activation_gets_a_smaller_ball():
    A = 10 * torch.ones(4, 4, dtype=torch.float64)
    sums = [
        float(ImplicitFunctionInf(kappa=0.9, activation=a).state_matrix(A).dense().sum(1).max())
        for a in ("relu", "silu", "sigmoid", Activation(torch.sin, torch.cos, 3.0), torch.sin)
    ]
    assert sums == pytest.approx([0.9, 0.9 / 1.0998395, 0.9, 0.3, 0.9])


def test_low_rank_factors_give_what_their_product_gives(tensors):
    _, B, u, bias = tensors
    left, right = drawn(6, 2, seed=4) / 20, drawn(6, 2, seed=5)
    f = ImplicitFunctionInf(tol=1e-12)
    expected = f(left @ right.T, B, u, bias=bias)
    torch.testing.assert_close(f((left, right), B, u, bias=bias), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("activation", ["relu", "silu", torch.sin])
def test_an_error_bound_is_given_where_the_slope_is_known(activation, tensors):
    A, B, u, _ = tensors
    bound = ImplicitFunctionInf(kappa=0.9, activation=activation).solution(A, B, u).error_bound
    assert (bound is None) == (activation is torch.sin)
    assert ImplicitFunction(activation=activation).solution(A, B, u).error_bound is None
    assert ImplicitFunctionTriu(activation=activation).solution(A, B, u).error_bound is None


def test_phi_and_dphi_are_those_of_the_activation():
    f, z = ImplicitFunction(activation="tanh"), drawn(3, 4, seed=0)
    assert torch.equal(f.phi(z), torch.tanh(z))
    torch.testing.assert_close(f.dphi(z), 1 - torch.tanh(z) ** 2)


def test_an_unknown_derivative_is_said_to_be_so():
    with pytest.raises(TypeError, match="sin has no known derivative; autograd differentiates it"):
        ImplicitFunction(activation=torch.sin).dphi(torch.ones(2))


def test_a_triangular_function_finds_the_derivative_of_a_callable():
    z = drawn(3, 4, seed=0)
    torch.testing.assert_close(ImplicitFunctionTriu(activation=torch.sin).dphi(z), torch.cos(z))


class Own(ImplicitFunctionInf):
    def phi(self, z):
        return torch.atan(z)


class OwnTriangular(ImplicitFunctionTriu):
    def phi(self, z):
        return torch.atan(z)


def test_an_overridden_phi_is_the_activation(tensors):
    A, B, u, _ = tensors
    f = Own(tol=1e-12)
    x = f(A, B, u)
    torch.testing.assert_close(x, torch.atan(x @ A.T + u @ B.T), rtol=0, atol=1e-11)
    assert repr(f.activation) == "Own.phi"


def test_an_overridden_phi_works_in_a_triangular_function(tensors):
    A, B, u, _ = tensors
    x = OwnTriangular()(A, B, u)
    torch.testing.assert_close(x, torch.atan(x @ A.triu(1).T + u @ B.T), rtol=0, atol=1e-14)


def test_an_overridden_phi_and_an_activation_contradict_each_other():
    with pytest.raises(ValueError, match=r"`activation` must be None because Own overrides phi; got 'tanh'"):
        Own(activation="tanh")


class Steep(ImplicitFunctionInf):
    lipschitz = 3.0

    def phi(self, z):
        return 3 * torch.tanh(z)

    def dphi(self, z):
        return 3 * (1 - torch.tanh(z) ** 2)


def test_a_subclass_that_knows_its_slope_contracts_and_has_an_error_bound(tensors):
    A, B, u, _ = tensors
    f = Steep(kappa=0.9, tol=1e-4)
    assert f.state_matrix(10 * A).dense().abs().sum(1).max() <= 0.3
    found, exact = (g.solution(10 * A, B, u) for g in (f, Steep(kappa=0.9, tol=1e-13)))
    error = (found.x - exact.x).abs().amax(1)
    assert (error <= found.error_bound).all() and found.error_bound.max() < 1e-2


def test_a_slope_is_a_positive_number(as_users_run_it):
    with pytest.raises(ValueError, match=r"`lipschitz` must be finite and > 0; got -1"):
        Activation(torch.sin, lipschitz=-1.0)
    with pytest.raises(TypeError, match=r"`phi` must be a function of a tensor; got 'tanh'"):
        Activation("tanh")


def test_a_copy_of_a_function_uses_its_own_phi():
    class Learned(ImplicitFunctionInf):
        def __init__(self, slope):
            super().__init__()
            self.slope = slope

        def phi(self, z):
            return self.slope * torch.tanh(z)

    one = Learned(0.5)
    two = copy.deepcopy(one)
    two.slope = 0.25
    A, B, u = torch.zeros(2, 2), torch.eye(2), torch.ones(1, 2)
    torch.testing.assert_close(one(A, B, u), 2 * two(A, B, u))


def test_functions_share_no_settings(tensors):
    A, B, u, _ = tensors
    one, two = ImplicitFunctionInf(kappa=0.9, tol=1e-3), ImplicitFunctionInf(kappa=0.1, tol=1e-9)
    before = one(10 * A, B, u)
    two(10 * A, B, u)
    assert torch.equal(one(10 * A, B, u), before)
    assert one.constraint == InfNorm(0.9) and two.constraint == InfNorm(0.1)


def test_the_representation_names_all_four_choices():
    text = repr(ImplicitFunctionInf(kappa=0.9, activation="tanh", solver=Picard(damping=0.5), adjoint=PhantomAdjoint()))
    for words in ("ImplicitFunctionInf(tanh, ", "InfNorm(kappa=0.9)", "Picard(", "damping=0.5", "PhantomAdjoint("):
        assert words in text


BAD = [
    ({"mitr": 0}, ValueError, "`mitr` must be an integer >= 1; got 0"),
    ({"mitr": 1.5}, TypeError, "`mitr` must be an integer >= 1; got 1.5"),
    ({"grad_mitr": -1}, ValueError, "`grad_mitr` must be an integer >= 1; got -1"),
    ({"tol": -1.0}, ValueError, "`tol` must be finite and >= 0; got -1.0"),
    ({"grad_tol": float("inf")}, ValueError, "`grad_tol` must be finite and >= 0; got inf"),
    ({"activation": "rleu"}, ValueError, "`activation` must be one of 'relu'"),
    ({"activation": 3}, TypeError, "`activation` must be a name"),
    ({"on_failure": "explode"}, ValueError, "`on_failure` must be one of 'raise', 'warn', 'ignore'; got 'explode'"),
]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("kind", [ImplicitFunction, ImplicitFunctionInf])
@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_a_setting_out_of_range_is_refused_and_named(kind, options, error, message):
    with pytest.raises(error) as caught:
        kind(**options)
    assert message in str(caught.value)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("option", "value"), [("solver", "picard"), ("adjoint", Newton), ("constraint", InfNorm), ("solver", Anderson)]
)
def test_a_choice_that_is_no_object_of_its_kind_is_refused_and_named(option, value):
    with pytest.raises(TypeError, match=f"`{option}` must be"):
        ImplicitFunction(**{option: value})


@pytest.mark.parametrize("kind", [ImplicitFunction, ImplicitFunctionInf])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": Newton(), "mitr": 7}, r"`mitr` must not be given beside solver=Newton\("),
        ({"solver": Newton(), "mitr": 7, "tol": 1e-9}, "`mitr`, `tol` must not be given beside solver="),
        ({"adjoint": PhantomAdjoint(), "grad_tol": 1e-9}, r"`grad_tol` must not be given beside adjoint=PhantomAdj"),
        ({"adjoint": ImplicitAdjoint(), "grad_mitr": 7}, "`grad_mitr` must not be given beside adjoint="),
    ],
)
def test_a_setting_is_refused_beside_what_has_its_own(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize("kind", [ImplicitFunction, ImplicitFunctionInf])
def test_settings_of_the_other_solve_go_with_a_solver_or_an_adjoint(kind):
    assert kind(solver=Newton(), grad_tol=1e-9, grad_mitr=7).adjoint.solver == Adaptive(0.0, 1e-9, 7)
    assert kind(adjoint=PhantomAdjoint(), tol=1e-9, mitr=7).solver == Adaptive(1e-9, 0.0, 7)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_misspelt_option_is_refused(kind):
    with pytest.raises(TypeError, match="tolerance"):
        kind(tolerance=1e-3)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("A", [[[0.5]], None, torch.ones(6, 6, dtype=torch.int64)], ids=["list", "None", "int64"])
def test_a_state_matrix_that_is_no_floating_tensor_is_refused(kind, A):
    with pytest.raises(TypeError, match=r"`A` must"):
        kind()(A, torch.ones(6, 4), torch.ones(5, 4))


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("shape", [(6, 5), (6,), (2, 6, 6), ()], ids=str)
def test_a_state_matrix_that_is_no_square_matrix_is_refused(kind, shape):
    with pytest.raises(ValueError, match=r"`A` must be .*; got shape"):
        kind()(torch.zeros(shape), torch.ones(6, 4), torch.ones(5, 4))


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("shapes", [((6, 2), (6, 3)), ((6, 2), (5, 2)), ((6,), (6,))], ids=str)
def test_factors_that_do_not_fit_each_other_are_refused(shapes):
    left, right = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"`A`"):
        ImplicitFunctionInf()((left, right), torch.ones(6, 4), torch.ones(5, 4))
