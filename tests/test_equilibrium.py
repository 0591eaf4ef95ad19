import inspect
import math
import re

import pytest
import torch

import idl
from idl import (
    Activation,
    Adaptive,
    Anderson,
    ConvergenceError,
    ConvergenceWarning,
    ImplicitFunctionInf,
    ImplicitFunctionTriu,
    Newton,
    Picard,
    Solution,
    equilibrium,
    fixed_point,
)
from idl.linalg.operators import Dense, Factored, StrictlyUpper


def drawn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(n=6, p=4, batch=(5,), dtype=torch.float64):
    A = drawn(n, n, seed=0)
    A = A * 0.8 / A.abs().sum(1, keepdim=True)
    return A.to(dtype), drawn(n, p, seed=1, dtype=dtype), drawn(*batch, p, seed=2, dtype=dtype)


# --- equilibrium ----------------------------------------------------------------------------------------------------


def test_the_signature_is_the_promised_one():
    parameters = inspect.signature(equilibrium).parameters
    assert list(parameters) == ["A", "B", "u", "bias", "phi", "x0", "solver", "adjoint", "on_failure"]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in list(parameters.values())[3:])


def test_one_number_has_its_closed_form():
    solution = equilibrium(torch.tensor([[0.5]]), torch.tensor([[1.0]]), torch.tensor([[1.0], [-1.0]]))
    torch.testing.assert_close(solution.x, torch.tensor([[2.0], [0.0]]), rtol=0, atol=1e-5)


def test_a_linear_equilibrium_has_its_closed_form():
    A, B, u = problem()
    x = equilibrium(A, B, u, phi="identity", solver=Picard(atol=1e-13)).x
    expected = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - A, (u @ B.T).T).T
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "phi", ["relu", "tanh", torch.sin, lambda z: torch.softmax(z, -1)], ids=["relu", "tanh", "sin", "softmax"]
)
@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (0,)], ids=str)
def test_the_solution_satisfies_the_equation(phi, batch):
    A, B, u = problem(batch=batch)
    bias = drawn(6, seed=3)
    solution = equilibrium(A, B, u, bias=bias, phi=phi, solver=Picard(atol=1e-12))
    assert isinstance(solution, Solution)
    assert solution.x.shape == (*batch, 6)
    function = getattr(torch, phi) if isinstance(phi, str) else phi
    torch.testing.assert_close(solution.x, function(solution.x @ A.T + u @ B.T + bias), rtol=0, atol=1e-11)
    assert solution.residual.shape == solution.steps.shape == solution.converged.shape == batch


def test_the_solution_is_the_same_for_every_form_of_the_matrix():
    _, B, u = problem()
    left, right = drawn(6, 2, seed=4) / 10, drawn(6, 2, seed=5)
    product = left @ right.T
    solver = Picard(atol=1e-13)
    expected = equilibrium(product, B, u, solver=solver).x
    for form in (Dense(product), Factored(left, right)):
        torch.testing.assert_close(equilibrium(form, B, u, solver=solver).x, expected, rtol=0, atol=1e-11)
    upper = product.triu(1)
    expected = equilibrium(upper, B, u, solver=solver).x
    torch.testing.assert_close(equilibrium(StrictlyUpper(upper), B, u, solver=solver).x, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_solved_in_float32_and_rounded_once(dtype):
    A, B, u = problem(dtype=dtype)
    solution = equilibrium(A, B, u)
    assert solution.x.dtype == dtype and bool(solution.converged.all())
    Z = torch.nn.functional.linear(u, B).float()
    exact = equilibrium(A.float(), torch.eye(6), Z, solver=Picard(atol=1e-7)).x
    torch.testing.assert_close(solution.x.float(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_residual_is_that_of_the_returned_state_in_half_precision_too(dtype):
    A, B, u = problem(dtype=dtype)
    solution = equilibrium(A, B, u)
    Z = torch.nn.functional.linear(u.double(), B.double())
    true = (torch.relu(solution.x.double() @ A.double().T + Z) - solution.x.double()).abs().amax(1)
    torch.testing.assert_close(solution.residual.double(), true, rtol=1e-2, atol=1e-6)


def test_autocast_does_not_reach_into_the_solve():
    A, B, u = problem(dtype=torch.float32)
    exact = equilibrium(A, B, u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = equilibrium(A, B, u)
    assert bool(solution.converged.all())
    # Only the product with B is cast: 8 bits of a sum of four terms.
    torch.testing.assert_close(solution.x.float(), exact.x, rtol=0.05, atol=0.1)


def test_a_failure_under_a_contraction_says_that_it_is_slow():
    eye = torch.eye(2, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match=r"max row sum of \|A\| is 0\.999, so the map contracts, but slowly"):
        equilibrium(0.999 * eye.flip(0), eye, torch.ones_like(eye), solver=Picard(max_steps=5))


@pytest.mark.parametrize("phi", [lambda z: 3 * torch.cos(10 * z), Activation(lambda z: 2 * z.sin(), lipschitz=2.0)])
def test_a_failure_claims_no_contraction_where_the_activation_may_be_steep(phi):
    eye = torch.eye(2, dtype=torch.float64)
    with pytest.warns(
        ConvergenceWarning, match="but the activation may be steeper than 1, so the map need not contract"
    ):
        equilibrium(0.999 * eye.flip(0), eye, torch.ones_like(eye), phi=phi, solver=Picard(atol=0.0, max_steps=5))


def test_newton_that_failed_under_a_contraction_advises_more_steps_which_arrive():
    A = 0.999 * torch.eye(300).roll(1, 0)  # a wave runs around this ring, one unit a step
    B, bias, u = torch.eye(300)[:, :1], torch.full((300,), -0.01), torch.linspace(3, 5, 8)[:, None]
    with pytest.warns(ConvergenceWarning, match=r"Lower kappa, or raise mitr \(the solver's max_steps\)\."):
        equilibrium(A, B, u, bias=bias)
    assert bool(equilibrium(A, B, u, bias=bias, solver=Adaptive(max_steps=600)).converged.all())


@pytest.mark.parametrize(
    ("solver", "phi", "names_newton"),
    [
        (Picard(max_steps=20), "relu", True),
        (Adaptive(max_steps=20), torch.cos, True),  # of which no derivative is known: Anderson took over
        (Adaptive(max_steps=20), "relu", False),  # Newton took over
        (Newton(max_steps=20), "relu", False),
    ],
)
def test_a_failure_does_not_advise_what_was_tried(solver, phi, names_newton):
    u = torch.ones(1, 1, dtype=torch.float64)
    A = torch.full_like(u, 3.0)  # x = relu(3 x + 1) and x = cos(3 x + 1): no solution, and one that expands
    with pytest.warns(ConvergenceWarning) as caught:
        equilibrium(A, u, u, phi=phi, solver=solver)
    assert ("try solver=Newton()" in str(caught[0].message)) == names_newton


BAD = {
    "A is not square": (lambda A, B, u: (A[:, :5], B, u, {}), ValueError, ["`A`", "square", "(6, 5)"]),
    "A is a vector": (lambda A, B, u: (A[0], B, u, {}), ValueError, ["`A`", "(6,)"]),
    "A is a list": (lambda A, B, u: ([[0.5]], B, u, {}), TypeError, ["`A`", "torch.Tensor", "list"]),
    "A is sparse": (lambda A, B, u: (A.to_sparse(), B, u, {}), TypeError, ["`A`", "dense", "A.to_dense()"]),
    "u is sparse": (lambda A, B, u: (A, B, u.to_sparse(), {}), TypeError, ["`u`", "dense", "u.to_dense()"]),
    "x0 is sparse": (
        lambda A, B, u: (A, B, u, {"x0": (u @ B.T).to_sparse()}),
        TypeError,
        ["`x0`", "dense", "x0.to_dense()"],
    ),
    "A is integer": (lambda A, B, u: (A.long(), B, u, {}), TypeError, ["`A`", "floating-point", "int64"]),
    "B has other rows": (lambda A, B, u: (A, B[:5], u, {}), ValueError, ["`B`", "(6, p)", "(5, 4)"]),
    "B is a vector": (lambda A, B, u: (A, B[0], u, {}), ValueError, ["`B`", "(6, p)", "(4,)"]),
    "u has other columns": (lambda A, B, u: (A, B, u[:, :3], {}), ValueError, ["`u`", "(..., 4)", "(6, 4)", "(5, 3)"]),
    "u is a number": (lambda A, B, u: (A, B, u[0, 0], {}), ValueError, ["`u`", "(..., 4)", "()"]),
    "u is an image": (
        lambda A, B, u: (A, B, u.reshape(5, 2, 2), {}),
        ValueError,
        ["`u`", "(..., 4)", "(5, 2, 2)", "u.flatten(1)"],
    ),
    "u is float32": (lambda A, B, u: (A, B, u.float(), {}), TypeError, ["`u`", "float32", "float64"]),
    "u is elsewhere": (lambda A, B, u: (A, B, u.to("meta"), {}), ValueError, ["`u`", "meta", "cpu"]),
    "B is elsewhere": (lambda A, B, u: (A, B.to("meta"), u, {}), ValueError, ["`B`", "meta", "cpu"]),
    "bias is long": (lambda A, B, u: (A, B, u, {"bias": u.new_ones(7)}), ValueError, ["`bias`", "(6,)", "(7,)"]),
    "bias is a column": (
        lambda A, B, u: (A, B, u, {"bias": u.new_ones(6, 1)}),
        ValueError,
        ["`bias`", "(6,)", "(6, 1)"],
    ),
    "x0 has other columns": (
        lambda A, B, u: (A, B, u, {"x0": u.new_ones(5, 7)}),
        ValueError,
        ["`x0`", "(5, 6)", "(5, 7)"],
    ),
    "x0 has other rows": (
        lambda A, B, u: (A, B, u, {"x0": u.new_ones(4, 6)}),
        ValueError,
        ["`x0`", "(5, 6)", "(4, 6)"],
    ),
    "x0 is integer": (
        lambda A, B, u: (A, B, u, {"x0": torch.ones(5, 6, dtype=torch.int64)}),
        TypeError,
        ["`x0`", "floating-point"],
    ),
    "phi is unknown": (lambda A, B, u: (A, B, u, {"phi": "rleu"}), ValueError, ["`phi`", "'relu'", "'rleu'"]),
    "phi is a number": (lambda A, B, u: (A, B, u, {"phi": 3}), TypeError, ["`phi`", "callable", "int"]),
    "on_failure is unknown": (
        lambda A, B, u: (A, B, u, {"on_failure": "explode"}),
        ValueError,
        ["`on_failure`", "'raise', 'warn', 'ignore'", "'explode'"],
    ),
    "solver is a string": (lambda A, B, u: (A, B, u, {"solver": "picard"}), TypeError, ["`solver`"]),
    "adjoint is a class": (lambda A, B, u: (A, B, u, {"adjoint": idl.ImplicitAdjoint}), TypeError, ["`adjoint`"]),
}


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("case", BAD)
def test_an_argument_that_does_not_fit_is_named_with_what_was_expected_and_what_came(case):
    change, kind, words = BAD[case]
    A, B, u, options = change(*problem())
    with pytest.raises(kind) as caught:
        equilibrium(A, B, u, **options)
    message = str(caught.value)
    assert [w for w in words if w not in message] == [], message


# --- any fixed point ------------------------------------------------------------------------------------------------

SOLVERS = [Picard(atol=1e-12), Anderson(atol=1e-12), Newton(atol=1e-12), idl.Adaptive(atol=1e-12)]


def cosine(x):
    return torch.cos(x)


COSINE = 0.7390851332151607


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 2), (2, 3, 4)], ids=str)
def test_a_state_of_any_shape_is_solved(shape, solver):
    solution = fixed_point(cosine, torch.zeros(shape, dtype=torch.float64), solver=solver)
    assert solution.x.shape == shape
    torch.testing.assert_close(solution.x, torch.full(shape, COSINE, dtype=torch.float64), rtol=0, atol=1e-11)
    samples = shape[:1] if len(shape) >= 2 else ()
    assert solution.residual.shape == solution.steps.shape == solution.converged.shape == samples
    assert solution.error_bound is None


def test_a_nest_of_tensors_is_a_state():
    def f(state, shift):
        return {"a": torch.cos(state["b"][0]) + shift, "b": [0.5 * torch.sin(state["a"]), state["b"][1] / 2 + 1]}

    x0 = {"a": torch.zeros(3, 2, dtype=torch.float64), "b": [torch.zeros(3, 2, dtype=torch.float64)] * 2}
    solution = fixed_point(f, x0, torch.tensor(0.1, dtype=torch.float64), solver=Picard(atol=1e-12))
    assert set(solution.x) == {"a", "b"} and isinstance(solution.x["b"], list)
    assert solution.steps.shape == (3,)
    image = f(solution.x, 0.1)
    for actual, expected in ((image["a"], solution.x["a"]), *zip(image["b"], solution.x["b"], strict=True)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(solution.x["b"][1], torch.full((3, 2), 2.0, dtype=torch.float64), rtol=0, atol=1e-11)


def test_tensors_of_different_first_sizes_are_one_sample():
    x0 = (torch.zeros(3, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    solution = fixed_point(lambda s: (torch.cos(s[0]), torch.cos(s[1])), x0)
    assert solution.steps.shape == ()
    assert [tuple(x.shape) for x in solution.x] == [(3, 2), (4,)]


def test_parameters_may_be_nests_with_values_that_are_no_tensors():
    def f(x, options, scale):
        return torch.cos(x) * options["weight"] + (1 if options["shifted"] else 0) * scale

    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x0 = torch.zeros(3, dtype=torch.float64)
    x = fixed_point(f, x0, {"weight": weight, "shifted": True}, 2.0, solver=Picard(atol=1e-12)).x
    torch.testing.assert_close(x, torch.cos(x) * 0.5 + 2, rtol=0, atol=1e-11)
    (gradient,) = torch.autograd.grad(x[0], weight)
    value = float(x[0].detach())
    expected = math.cos(value) / (1 + 0.5 * math.sin(value))
    assert float(gradient) == pytest.approx(expected, rel=1e-5)


def test_what_a_function_reads_from_outside_gets_a_gradient():
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x = fixed_point(lambda x: scale * torch.cos(x), torch.zeros(1, dtype=torch.float64), solver=Picard(atol=1e-12)).x
    (gradient,) = torch.autograd.grad(x.sum(), scale)
    value = float(x.detach())
    assert float(gradient) == pytest.approx(math.cos(value) / (1 + 0.5 * math.sin(value)), rel=1e-5)


def test_a_module_is_a_map_and_its_parameters_get_gradients():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 3).double()
    with torch.no_grad():
        layer.weight.mul_(0.3)
    x = fixed_point(lambda x: torch.tanh(layer(x)), torch.zeros(2, 3, dtype=torch.float64), solver=Picard(atol=1e-12)).x
    x.sum().backward()
    assert bool(layer.weight.grad.isfinite().all()) and bool((layer.bias.grad != 0).all())


def test_the_start_of_a_state_is_not_changed_and_gets_no_gradient():
    x0 = torch.zeros(2, 3, requires_grad=True)
    scale = torch.ones(1, requires_grad=True)
    x = fixed_point(lambda x: torch.cos(scale * x), x0).x
    x.sum().backward()
    assert x0.grad is None and scale.grad is not None
    assert torch.equal(x0, torch.zeros(2, 3))


def test_samples_may_depend_on_each_other():
    def f(x):
        return torch.cos(x.mean(0, keepdim=True).expand_as(x)) + torch.tensor([[0.1], [0.2]], dtype=torch.float64)

    solution = fixed_point(f, torch.zeros(2, 3, dtype=torch.float64), solver=Picard(atol=1e-12))
    torch.testing.assert_close(solution.x, f(solution.x), rtol=0, atol=1e-11)


def test_a_map_that_grows_is_reported_and_its_advice_speaks_of_the_map():
    with pytest.warns(ConvergenceWarning, match=r"The map may not contract\.") as caught:
        solution = fixed_point(lambda x: 2 * x + 1, torch.zeros(2, 3), solver=Picard(max_steps=20))
    assert len(caught) == 1
    assert bool(solution.x.isfinite().all()) and not bool(solution.converged.any())
    with pytest.raises(ConvergenceError):
        fixed_point(lambda x: 2 * x + 1, torch.zeros(2, 3), solver=Picard(max_steps=20), on_failure="raise")


BAD_STATES = {
    "no tensor": (cosine, [], ValueError, "`x0` must hold at least one tensor"),
    "a number": (cosine, 1.0, TypeError, "`x0` must be a torch.Tensor; got float"),
    "integers": (cosine, torch.zeros(2, dtype=torch.int64), TypeError, "`x0` must have a floating-point dtype"),
    "two dtypes": (
        lambda s: s,
        [torch.zeros(2), torch.zeros(2, dtype=torch.float64)],
        TypeError,
        "`x0[1]` has dtype torch.float64 but `x0[0]` has torch.float32",
    ),
    "another structure": (lambda x: (x, x), torch.zeros(2), ValueError, "`f` must return a state of the structure"),
    "another shape": (lambda x: x[:1], torch.zeros(2), ValueError, "expected (2,), got (1,)"),
    "a number as image": (lambda x: 1.0, torch.zeros(2), ValueError, "got float"),
}


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_that_does_not_fit_is_named(case):
    f, x0, kind, message = BAD_STATES[case]
    with pytest.raises(kind) as caught:
        fixed_point(f, x0)
    assert message in str(caught.value)


def test_an_error_inside_the_function_comes_through():
    class Own(Exception):
        pass

    def f(x):
        raise Own

    with pytest.raises(Own):
        fixed_point(f, torch.zeros(2))


IN_PLACE = {
    "LeakyReLU module": (torch.nn.LeakyReLU(0.2, inplace=True), torch.nn.LeakyReLU(0.2)),
    "ELU module": (torch.nn.ELU(inplace=True), torch.nn.ELU()),
    "ReLU function": (lambda z: torch.nn.functional.relu(z, inplace=True), torch.relu),
    "tanh_ with its slope": (Activation(torch.tanh_, lambda z: 1 - torch.tanh(z) ** 2), torch.tanh),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_an_activation_may_work_in_place(name):
    in_place, plain = IN_PLACE[name]
    A, B, u = (t.double().requires_grad_() for t in problem(dtype=torch.float32))
    for make in (ImplicitFunctionInf, ImplicitFunctionTriu):
        results = [make(activation=phi)(A, B, u) for phi in (in_place, plain)]
        torch.testing.assert_close(*results, rtol=0, atol=1e-5)
        gradients = [torch.autograd.grad(x.square().sum(), (A, B, u)) for x in results]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_bound_holds_for_the_equation_as_given_also_where_the_input_part_is_rounded():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(100, 100, generator=generator) / 200, torch.randn(100, 784, generator=generator) / 28
    u = torch.rand(64, 784, generator=generator)
    solution = ImplicitFunctionInf(kappa=0.5, tol=1e-7).solution(A, B, u)
    exact = torch.zeros(64, 100, dtype=torch.float64)
    admitted = ImplicitFunctionInf(kappa=0.5).state_matrix(A).dense().double()
    for _ in range(200):
        exact = torch.relu(exact @ admitted.T + u.double() @ B.double().T)
    assert bool(((solution.x - exact).abs().amax(1) <= solution.error_bound).all())


def test_no_bound_is_claimed_where_the_residual_is_rounded():
    phi = Activation(torch.nn.functional.leaky_relu, lipschitz=1.0)
    A, B, u = problem(dtype=torch.float32)
    assert ImplicitFunctionInf(activation=phi).solution(A, B, u).error_bound is None


@pytest.mark.parametrize("solver", [Adaptive(), Anderson(), Newton()], ids=repr)
def test_an_equation_without_a_solution_is_not_called_solved(solver):
    A = torch.full((3, 3), 1 / 3)  # x = relu(x + 1) in the end
    solution = equilibrium(A, torch.eye(3), torch.ones(2, 3), solver=solver, on_failure="ignore")
    assert not bool(solution.converged.any())


@pytest.mark.parametrize(
    ("activation", "error", "words"),
    [
        (torch.nn.ReLU, TypeError, "Did you mean ReLU()?"),
        (lambda z: z.double(), ValueError, "`activation` must return"),
        (Activation(torch.tanh, lambda z: (1 - z.tanh() ** 2).mean()), ValueError, "`derivative` must return"),
        (Activation(torch.tanh, lambda z: 1 - z.tanh().mean(0) ** 2), ValueError, "`derivative` must return"),
        (Activation(torch.tanh, lambda z: 1.0), ValueError, "`derivative` must return"),
        (lambda z: z[:, :1], ValueError, "got torch.float32 (5, 1)"),
    ],
)
def test_an_activation_that_is_none_says_so(activation, error, words):
    A, B, u = problem(dtype=torch.float32)
    with pytest.raises(error, match=re.escape(words)):
        equilibrium(A, B, u, phi=activation)


def test_a_triangular_model_refuses_an_activation_that_couples_units():
    with pytest.raises(ValueError, match="each entry by itself"):
        ImplicitFunctionTriu(activation=torch.nn.Softmax(-1))
    ImplicitFunctionTriu(activation=torch.nn.LayerNorm(6))  # cannot be looked at before its size is known
