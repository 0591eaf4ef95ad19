"""On a GPU everything is as on the CPU; skipped where there is none."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from idl import (
    Adaptive,
    Anderson,
    IDLAttention,
    IDLHead,
    ImplicitAdjoint,
    ImplicitFunctionInf,
    ImplicitFunctionTriu,
    ImplicitModel,
    ImplicitRNN,
    Newton,
    PhantomAdjoint,
    Picard,
    UnrolledAdjoint,
    equilibrium,
    fixed_point,
)
from idl.models import GPTLanguageModel
from idl.nn import convert_attention
from idl.sim import SIM
from idl.sim.solvers import ADMM, AcceleratedGradient, Cardinality, CoordinateDescent
from idl.training import Labelled, Recipe, fit_supervised

DEVICE = "cuda"

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def implicit(**options):
    return ImplicitModel(20, 8, 3, **options)


def f(**options):
    return {"f": ImplicitFunctionInf(**options)}


MODELS = {
    # Inputs are (batch, 8) for the first, (batch, time, 8) for the others.
    "full": implicit,
    "low rank": lambda: implicit(low_rank=True, rank=2),
    "triangular": lambda: implicit(f=ImplicitFunctionTriu()),
    "Picard": lambda: implicit(**f(solver=Picard())),
    "Anderson": lambda: implicit(**f(solver=Anderson())),
    "Newton": lambda: implicit(**f(solver=Newton())),
    "callable": lambda: implicit(activation=torch.tanh),
    "module": lambda: implicit(activation=nn.PReLU()),
    "unrolled": lambda: implicit(**f(adjoint=UnrolledAdjoint(40))),
    "phantom": lambda: implicit(**f(adjoint=PhantomAdjoint(steps=5))),
    "no direct term, bias": lambda: implicit(direct=False, bias=True),
    "recurrent": lambda: ImplicitRNN(8, 3, 6, 10, bidirectional=True),
    "recurrent, low rank": lambda: ImplicitRNN(8, 3, 6, 10, low_rank=True, rank=2, num_layers=2),
    "recurrent, triangular": lambda: ImplicitRNN(8, 3, 6, 10, f=ImplicitFunctionTriu),
    "recurrent, step by step": lambda: ImplicitRNN(8, 3, 6, 10, activation=torch.tanh),
    "parallel in time": lambda: ImplicitRNN(8, 3, 6, 10, activation="tanh", parallel_in_time=True),
    "head": lambda: IDLHead(4, 8, 12, bias=True),
    "softmax": lambda: IDLAttention(8, 2, 12),
    "lipschitz": lambda: IDLAttention(8, 2, 12, attention_version="lipschitz", contractive=True),
    "low-rank attention": lambda: IDLAttention(8, 2, 12, is_low_rank=True, rank=2),
    "attention of all tokens": lambda: IDLAttention(8, 2, 12, causal=False),
    "unrolled attention": lambda: IDLAttention(8, 2, 12, gradient="unrolled"),
}


def close(actual, expected, rtol=1e-4, atol=1e-5):
    """Both within the tolerance of the solves, 3e-6, of each other."""
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=rtol, atol=atol)


def outputs_and_gradients(model, u):
    model.zero_grad()
    y = model(u)
    y.square().sum().backward()
    return y.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_on_the_gpu_what_it_gives_on_the_cpu(name, dtype):
    torch.manual_seed(0)
    model, u = MODELS[name]().to(dtype), torch.rand(16, 12, 8, dtype=dtype)
    u = u[:, 0] if isinstance(model, ImplicitModel) else u
    y, gradients = outputs_and_gradients(model, u)
    moved_y, moved_gradients = outputs_and_gradients(model.to(DEVICE), u.to(DEVICE))
    assert moved_y.device.type == DEVICE
    factor = 1 if dtype == torch.float64 else 10  # a GPU sums in another order
    close(moved_y, y, atol=1e-5 * factor)
    for moved, expected in zip(moved_gradients, gradients, strict=True):
        close(moved, expected, rtol=1e-4 * factor, atol=1e-5 * factor * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("kappa", [0.99, 0.999])
@pytest.mark.parametrize("matrix", ["dense", "ring", "signs"])
def test_a_stiff_equilibrium_is_as_exact_on_the_gpu(matrix, kappa):
    torch.manual_seed(0)
    A = {"dense": torch.rand(200, 200), "ring": torch.eye(200).roll(1, 0), "signs": torch.randn(200, 200)}[matrix]
    A, u = A * kappa / A.abs().sum(1, keepdim=True), torch.randn(24, 8) @ torch.randn(8, 200)
    A, u = A.to(DEVICE), u.to(DEVICE).requires_grad_()
    solution = equilibrium(A, torch.eye(200, device=DEVICE), u, solver=Adaptive(), on_failure="raise")
    x = solution.x.detach().double()
    residual = (torch.relu(x @ A.double().T + u.detach().double()) - x).abs().amax(1)
    assert bool((residual <= (2e-7 * x.abs().amax(1)).clamp_min(3e-6)).all())
    solution.x.square().sum().backward()
    slope = (x > 0).double()
    dense = torch.eye(200, dtype=torch.float64, device=DEVICE) - A.double().T * slope[:, None]
    expected = slope * torch.linalg.solve(dense, 2 * x)
    close(u.grad.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_padded_and_packed_sequences_agree_on_the_gpu():
    torch.manual_seed(0)
    model = ImplicitRNN(8, 3, 6, 10, bidirectional=True).double().to(DEVICE)
    sequences = [torch.rand(length, 8, dtype=torch.float64, device=DEVICE) for length in (7, 3, 5)]
    padded = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    y = model(pack_sequence(sequences, enforce_sorted=False))
    close(y, model(padded, lengths=torch.tensor([7, 3, 5])))
    close(y[1], copy.deepcopy(model).cpu()(sequences[1].cpu()[None])[0])


def test_cached_generation_on_the_gpu_is_that_of_the_full_context():
    torch.manual_seed(0)
    explicit = GPTLanguageModel(20, n_embd=16, block_size=12, n_layer=2, n_head=2, dropout=0.0).to(DEVICE)
    model = convert_attention(explicit).eval()
    assert all(p.device.type == DEVICE for p in model.parameters())
    idx = torch.randint(20, (2, 4), device=DEVICE)
    for block in model.blocks:  # an A that does something
        nn.init.normal_(block.sa.A, std=0.1)
    written = model.generate(idx, 8, temperature=1e-4)
    for length in range(4, 12):
        logits = model(written[:, :length])[0]
        assert torch.equal(logits[:, -1].argmax(-1), written[:, length])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_under_autocast_is_solved_in_float32(dtype):
    torch.manual_seed(0)
    model, u = ImplicitModel(20, 8, 3).to(DEVICE), torch.rand(16, 8, device=DEVICE)
    expected = model(u)
    with torch.autocast(DEVICE, dtype):
        y, solution = model(u, return_solution=True)
    assert bool(solution.converged.all())
    close(y.float(), expected, rtol=0.02, atol=0.02)
    y.float().square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_second_derivatives_and_forward_mode_agree_with_finite_differences():
    torch.manual_seed(0)
    A, B, u = (torch.randn(*shape, dtype=torch.float64, device=DEVICE) for shape in ((4, 4), (4, 3), (2, 3)))
    A = 0.8 * A / A.abs().sum(1, keepdim=True)
    solver, adjoint = Picard(atol=1e-13, max_steps=1000), ImplicitAdjoint(Picard(atol=0.0, rtol=1e-13, max_steps=1000))

    def x(*arguments):
        return equilibrium(*arguments, phi="tanh", solver=solver, adjoint=adjoint).x

    arguments = tuple(t.clone().requires_grad_() for t in (A, B, u))
    assert torch.autograd.gradcheck(x, arguments, nondet_tol=1e-9)
    assert torch.autograd.gradgradcheck(x, arguments, nondet_tol=1e-9)
    tangents = tuple(torch.randn_like(t) for t in (A, B, u))
    _, tangent = torch.func.jvp(x, (A, B, u), tangents)
    ahead, behind = (x(*(t + h * d for t, d in zip((A, B, u), tangents, strict=True))) for h in (1e-6, -1e-6))
    close(tangent, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-7)


def test_a_run_on_the_gpu_goes_on_to_the_same_numbers(tmp_path):
    torch.manual_seed(0)
    data = Labelled(torch.randn(96, 8), torch.randint(3, (96,)))
    recipe = Recipe(epochs=4, batch_size=16, max_learning_rate=1e-2, seed=0)
    straight = nn.Sequential(ImplicitModel(20, 8, 16), nn.Dropout(0.3), nn.Linear(16, 3)).to(DEVICE)
    stopped, steps = copy.deepcopy(straight), iter(range(9))
    torch.manual_seed(1)
    expected = fit_supervised(straight, data, data, recipe)
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        file = tmp_path / "run.safetensors"
        fit_supervised(stopped, data, data, recipe, checkpoint=file, should_stop=lambda: next(steps) == 8)
    resumed = nn.Sequential(ImplicitModel(20, 8, 16), nn.Dropout(0.3), nn.Linear(16, 3)).to(DEVICE)
    history = fit_supervised(resumed, data, data, recipe, checkpoint=file)
    assert history.epochs == expected.epochs
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


SIMS = {
    "default": SIM,
    "ADMM": lambda lam: SIM(ADMM(), lam=lam),
    "accelerated gradient": lambda lam: SIM(AcceleratedGradient(), lam=lam),
    "coordinate descent": lambda lam: SIM(CoordinateDescent(), lam=lam),
    "cardinality": lambda lam: SIM(Cardinality(keep=5), lam=lam),
    "exact": lambda lam: SIM(exact=True, lam=lam),
    "layer by layer": lambda lam: SIM(lam=lam, refit="layers"),
    "rank 2": lambda lam: SIM(lam=lam, rank=2),
    "not rescaled": lambda lam: SIM(lam=lam, rescale=False),
}


@pytest.mark.parametrize("name", SIMS)
def test_sim_fits_on_the_gpu_what_it_fits_on_the_cpu(name):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))
    inputs = [torch.randn(64, 8) for _ in range(4)]
    expected = SIMS[name](lam=1e-2).fit(teacher, inputs)
    moved = [u.to(DEVICE) for u in inputs]
    sim = SIMS[name](lam=1e-2).fit(teacher.to(DEVICE), moved)
    assert sim.predict(moved[0]).device.type == DEVICE
    close(sim.predict(moved[0]), expected.predict(inputs[0]), rtol=1e-2, atol=2e-2)
    assert float(sim.model_.state_matrix().detach().abs().sum(1).max()) <= 0.99
    assert sim.certificate_.feasible and sim.certificate_.uncertified == ([], [])


def test_a_sparse_model_predicts_on_the_gpu_and_comes_back():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    inputs = [torch.randn(64, 8) for _ in range(4)]
    sparse = SIM(lam=2e-2).fit(teacher, inputs).model_
    with torch.no_grad():
        expected = sparse(inputs[0])
        close(sparse.to(DEVICE)(inputs[0].to(DEVICE)), expected)
        close(sparse.cpu()(inputs[0]), expected)


def test_inputs_of_another_device_are_refused_by_name():
    u = torch.rand(4, 8)
    for model, argument in (
        (ImplicitModel(20, 8, 3), u),
        (ImplicitRNN(8, 3, 6, 10), u[:, None]),
        (IDLAttention(8, 2, 12), u[:, None]),
    ):
        with pytest.raises(ValueError, match=r"`u`.*(cuda|cpu)"):
            model.to(DEVICE)(argument)


@pytest.mark.parametrize("solver", [Adaptive(), Anderson(), Picard()], ids=repr)
def test_a_general_fixed_point_is_found_on_the_gpu(solver):
    weight = torch.linspace(0.1, 0.5, 3, device=DEVICE).requires_grad_()
    x0 = {"a": torch.zeros(4, 3, device=DEVICE), "b": torch.zeros(4, 2, 3, device=DEVICE)}
    x = fixed_point(lambda x: {"a": torch.cos(weight * x["a"]), "b": torch.sin(x["b"]) / 2 + 1}, x0, solver=solver).x
    torch.testing.assert_close(x["a"], torch.cos(weight * x["a"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x["b"], torch.sin(x["b"]) / 2 + 1, rtol=1e-5, atol=1e-5)
    x["a"].sum().backward()
    a = x["a"].detach()[0]
    sine = torch.sin(weight.detach() * a)
    expected = -4 * a * sine / (1 + weight.detach() * sine)  # d a / d w of a = cos(w a), times four rows
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-5)
