import copy
import inspect
import io
import math
import pickle
import warnings
import weakref

import jaxtyping
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from idl import (
    Adaptive,
    Anderson,
    ConvergenceError,
    ConvergenceWarning,
    ImplicitAdjoint,
    ImplicitFunction,
    ImplicitFunctionInf,
    ImplicitFunctionTriu,
    ImplicitRNN,
    ImplicitRNNCell,
    InfNorm,
    InfNormProjection,
    Newton,
    PhantomAdjoint,
    Picard,
    UnrolledAdjoint,
)
from problems import Atan, AtanWithSlope
from tolerances import BFLOAT16, FLOAT32, FLOAT64, relative_error

P, Q, H, N = 3, 2, 4, 5
TIGHT = {"tol": 1e-13, "grad_tol": 1e-13, "mitr": 2000, "grad_mitr": 2000}
SOLVERS = {
    "Picard": Picard(1e-13, 0.0, 2000),
    "damped Picard": Picard(1e-13, 0.0, 2000, damping=0.7),
    "Anderson": Anderson(1e-13, 0.0, 2000),
    "Newton": Newton(1e-13, 0.0, 2000),
}


def instance(solver=None, adjoint=None, constraint=None, **settings):
    solver = Adaptive(1e-13, 0.0, 2000) if solver is None else solver
    adjoint = ImplicitAdjoint(Adaptive(0.0, 1e-13, 2000)) if adjoint is None else adjoint
    constraint = InfNorm(0.8) if constraint is None else constraint
    return ImplicitFunction(constraint=constraint, solver=solver, adjoint=adjoint, **settings)


OPTIONS = {
    "default": TIGHT,
    "bias, tanh": {"bias": True, "activation": "tanh", **TIGHT},
    "no direct term": {"direct": False, "activation": "leaky_relu", **TIGHT},
    "rank 1": {"low_rank": True, "rank": 1, **TIGHT},
    "rank 2": {"low_rank": True, "rank": 2, "activation": "tanh", **TIGHT},
    "rank 5": {"low_rank": True, "rank": 5, "activation": "softplus", **TIGHT},
    "silu": {"activation": "silu", "bias": True, **TIGHT},
    "callable activation": {"activation": torch.sin, **TIGHT},
    "own phi": {"f": Atan, **TIGHT},
    "own phi and dphi": {"f": AtanWithSlope, **TIGHT},
    "PReLU": {"activation": nn.PReLU(), **TIGHT},
    "triangular": {"f": ImplicitFunctionTriu},
    "projection": {"f": instance(constraint=InfNormProjection(0.8), activation="tanh")},
    "free": {"f": instance(constraint=None, activation="sigmoid")},
    **{name: {"f": instance(solver, activation="tanh")} for name, solver in SOLVERS.items()},
    "adjoint by Newton": {"f": instance(None, ImplicitAdjoint(Newton(0.0, 1e-13, 2000)), activation="tanh")},
    "two layers": {"num_layers": 2, "activation": "tanh", **TIGHT},
    "bidirectional": {"bidirectional": True, "activation": "tanh", **TIGHT},
    "two bidirectional layers": {"num_layers": 2, "bidirectional": True, "bias": True, **TIGHT},
    "parallel in time": {"parallel_in_time": True, **TIGHT},
    "parallel, silu": {"parallel_in_time": True, "activation": "silu", "bias": True, **TIGHT},
    "parallel, rank 2": {"parallel_in_time": True, "low_rank": True, "rank": 2, "activation": "tanh", **TIGHT},
    "parallel, triangular": {"parallel_in_time": True, "f": ImplicitFunctionTriu},
    "parallel, own phi": {"parallel_in_time": True, "f": Atan, **TIGHT},
    "parallel, two bidirectional layers": {"parallel_in_time": True, "num_layers": 2, "bidirectional": True, **TIGHT},
}
INEXACT = {
    "unrolled": {"f": instance(None, UnrolledAdjoint(60), InfNorm(0.4), activation="tanh")},
    "phantom": {"f": instance(None, PhantomAdjoint(3), InfNorm(0.4), activation="tanh")},
}
over = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
over_all = pytest.mark.parametrize("options", {**OPTIONS, **INEXACT}.values(), ids={**OPTIONS, **INEXACT}.keys())
FEW = {
    name: OPTIONS[name]
    for name in ("default", "rank 2", "silu", "callable activation", "bidirectional", "parallel, silu")
}
either_way = pytest.mark.parametrize("parallel_in_time", [False, True])
over_few = pytest.mark.parametrize("options", FEW.values(), ids=FEW.keys())


def model_of(options, dtype=torch.float64, seed=0, **more):
    torch.manual_seed(seed)
    sizes = {"input_dim": P, "output_dim": Q, "hidden_dim": H, "implicit_hidden_dim": N}
    return ImplicitRNN(**{**sizes, **copy.deepcopy(options), **more}).to(dtype)


def random(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(value, truth, tolerance=FLOAT64):
    torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance)


def by_steps(model, u, h0=None):
    """Return what the model says of sequences of one length, by an ImplicitModel a step and nothing of the sequence's.

    Prediction, prediction of each time, last hidden states, and the equilibria of each cell.
    """
    directions = 2 if model.bidirectional else 1
    batch, times, _ = u.shape
    h0 = u.new_zeros(len(model.cells), batch, model.hidden_dim) if h0 is None else h0
    below, lasts, equilibria = list(u.unbind(1)), [], []
    for first in range(0, len(model.cells), directions):
        outputs = [[None] * times for _ in range(directions)]
        for d in range(directions):
            h, cell = h0[first + d], model.cells[first + d].model
            states = [None] * times
            for t in range(times)[:: -1 if d else 1]:
                h, solution = cell(torch.cat((below[t], h), -1), return_solution=True)
                outputs[d][t], states[t] = h, solution.x
            lasts.append(h)
            equilibria.append(torch.stack(states, 1))
        below = [torch.cat(parts, -1) for parts in zip(*outputs, strict=True)]
    whole = model.readout(torch.stack(below, 1))
    return model.readout(torch.cat(lasts[-directions:], -1)), whole, torch.stack(lasts), torch.stack(equilibria)


# --- what users were promised ---------------------------------------------------------------------------------------


def test_the_signature_is_the_promised_one():
    parameters = inspect.signature(ImplicitRNN).parameters
    names = "input_dim output_dim hidden_dim implicit_hidden_dim low_rank rank mitr grad_mitr tol grad_tol f".split()
    positional = [n for n, p in parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert positional == names
    defaults = {name: p.default for name, p in parameters.items() if name not in names[:4]}
    assert defaults == {
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
        "num_layers": 1,
        "bidirectional": False,
        "batch_first": True,
        "return_sequence": False,
        "parallel_in_time": False,
    }


def test_the_call_of_the_documentation_trains():
    torch.manual_seed(0)
    model = ImplicitRNN(input_dim=1, output_dim=1, hidden_dim=22, implicit_hidden_dim=20, low_rank=True, rank=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    u = random(16, 12, 1, dtype=torch.float32)
    y, losses = u.sum(1), []
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(u), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_parameters_are_those_of_implicit_models_and_a_linear_map():
    shapes = {name: tuple(p.shape) for name, p in model_of({"bias": True}).named_parameters()}
    prefix = "cells.0.model."
    assert shapes == {
        prefix + "A": (N, N),
        prefix + "B": (N, P + H),
        prefix + "C": (H, N),
        prefix + "D": (H, P + H),
        prefix + "bias": (N,),
        "readout.weight": (Q, H),
        "readout.bias": (Q,),
    }
    layers = model_of({"num_layers": 2, "bidirectional": True})
    assert [tuple(cell.model.B.shape) for cell in layers.cells] == [(N, P + H)] * 2 + [(N, 2 * H + H)] * 2
    assert layers.readout.weight.shape == (Q, 2 * H)


@pytest.mark.parametrize("n", [20, 128])
def test_a_new_model_remembers_for_a_while_and_does_not_blow_up(n):
    torch.manual_seed(0)
    model = ImplicitRNN(1, 1, n, n)
    _, h = model(random(8, 300, 1, dtype=torch.float32), return_state=True)
    assert float(h.detach().abs().max()) < 20
    # Two histories that differ in one input long ago end alike, and not at once.
    u = random(8, 60, 1, dtype=torch.float32)
    moved = u.clone()
    moved[:, 0] += 1
    with torch.no_grad():
        late, soon = (
            float((model(u[:, :t], return_state=True)[1] - model(moved[:, :t], return_state=True)[1]).abs().max())
            for t in (60, 4)
        )
    assert late < 1e-2 * soon
    assert soon > 1e-2


def test_a_new_state_matrix_of_low_rank_is_no_larger_than_one_of_full_rank():
    # In its singular values: the same entries would be gathered in a few directions, and contract less.
    full, low = (model_of(o, hidden_dim=30, implicit_hidden_dim=60) for o in ({}, {"low_rank": True, "rank": 2}))
    norms = [float(torch.linalg.matrix_norm(m.cells[0].model.state_matrix().detach(), 2)) for m in (full, low)]
    assert 0.2 * norms[0] < norms[1] < norms[0]


# --- what it computes -----------------------------------------------------------------------------------------------


@over
def test_values_and_gradients_are_those_of_an_implicit_model_step_by_step(options):
    model = model_of(options)
    u, h0 = random(3, 6, P).requires_grad_(), random(len(model.cells), 3, H, seed=2).requires_grad_()
    y, h, solution = model(u, h0, return_state=True, return_solution=True)
    true_y, _, true_h, true_x = by_steps(model, u, h0)
    close(y, true_y)
    close(h, true_h)
    close(solution.x, true_x)
    assert bool(solution.converged.all())
    leaves = [u, h0, *model.parameters()]
    value, truth = y.square().sum() + h.sin().sum(), true_y.square().sum() + true_h.sin().sum()
    for ours, theirs in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(truth, leaves), strict=True):
        close(ours, theirs)


@over
def test_a_whole_sequence_is_that_of_an_implicit_model_step_by_step(options):
    model = model_of(options, return_sequence=True)
    u = random(3, 6, P).requires_grad_()
    y, solution = model(u, return_solution=True)
    _, true_y, _, true_x = by_steps(model, u)
    close(y, true_y)
    leaves, weights = [u, *model.parameters()], random(3, 6, Q, seed=3)
    value = (weights * y.square()).sum() + solution.x.sin().sum()
    truth = (weights * true_y.square()).sum() + true_x.sin().sum()
    for ours, theirs in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(truth, leaves), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("options", INEXACT.values(), ids=INEXACT.keys())
def test_a_recorded_gradient_is_that_of_the_steps(options):
    model = model_of(options, return_sequence=True)
    u = random(3, 6, P).requires_grad_()
    leaves = [u, *model.parameters()]
    value, truth = model(u).square().sum(), by_steps(model, u)[1].square().sum()
    close(value, truth)
    gradients = torch.autograd.grad(value, leaves), torch.autograd.grad(truth, leaves)
    # A phantom gradient depends on the last digits of where it is taken, and the starts differ.
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs, 1e-8)


@either_way
@pytest.mark.parametrize("rank", [None, 1, 4, 5, 70])
@pytest.mark.parametrize("n", [64, 65, 80])
def test_sizes_on_both_sides_of_every_switch_agree_with_the_steps(n, rank, parallel_in_time):
    # Ranks up to 4 are solved directly in the backward, and 64 units or fewer multiply as one matrix.
    if rank is not None and rank > n:
        pytest.skip("a rank is at most the size")
    options = {"low_rank": rank is not None, "rank": rank, "parallel_in_time": parallel_in_time}
    model = model_of({"implicit_hidden_dim": n, **options, **TIGHT})
    u = random(3, 5, P).requires_grad_()
    leaves = [u, *model.parameters()]
    value, truth = model(u).square().sum(), by_steps(model, u)[0].square().sum()
    for ours, theirs in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(truth, leaves), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_without_feedback_it_is_the_rnn_of_torch(num_layers, bidirectional):
    rnn = nn.RNN(P, N, num_layers, bidirectional=bidirectional, batch_first=True).double()
    model = model_of(
        {"num_layers": num_layers, "bidirectional": bidirectional, "activation": "tanh", "bias": True, "hidden_dim": N}
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
        for i, cell in enumerate(model.cells):
            weights, place = cell.model, f"_l{i // 2}_reverse" if bidirectional and i % 2 else None
            place = place or f"_l{i // 2 if bidirectional else i}"
            weights.A.zero_()
            weights.C.copy_(torch.eye(N))
            weights.D.zero_()
            p = weights.B.shape[1] - N
            getattr(rnn, "weight_ih" + place).copy_(weights.B[:, :p])
            getattr(rnn, "weight_hh" + place).copy_(weights.B[:, p:])
            getattr(rnn, "bias_ih" + place).copy_(weights.bias)
            getattr(rnn, "bias_hh" + place).zero_()
    u, h0 = random(3, 6, P), random(len(model.cells), 3, N, seed=2)
    expected, h_n = rnn(u, h0)
    model.return_sequence = True
    y, h = model(u, h0, return_state=True)
    close(y, model.readout(expected))
    close(h, h_n)
    packed = pack_padded_sequence(u, [3, 6, 1], batch_first=True, enforce_sorted=False)
    expected, h_n = rnn(packed, h0)
    y, h = model(packed, h0, return_state=True)
    close(y.data, model.readout(expected.data))
    close(h, h_n)


# --- streaming ------------------------------------------------------------------------------------------------------


@over_few
def test_a_cell_step_by_step_gives_what_the_whole_sequence_gives(options):
    options = {name: value for name, value in options.items() if name != "bidirectional"}
    model = model_of(options, return_sequence=True)
    u, h = random(3, 6, P), random(3, H, seed=2)
    y, h_n = model(u, h[None], return_state=True)
    x = None
    for t in range(6):
        h, solution = model.cells[0](u[:, t], h, x, return_solution=True)
        x = solution.x
        close(model.readout(h), y[:, t])
    close(h, h_n[0])


def test_a_sequence_can_be_cut_anywhere():
    model = model_of(TIGHT)
    u = random(3, 9, P)
    y, h_n = model(u, return_state=True)
    _, h = model(u[:, :4], return_state=True)
    later_y, later_h = model(u[:, 4:], h, return_state=True)
    close(later_y, y)
    close(later_h, h_n)


@pytest.mark.parametrize("batch", [(), (3,), (0,), (2, 3)], ids=str)
def test_a_cell_takes_any_batch_and_starts_from_zeros(batch):
    torch.manual_seed(0)
    cell = ImplicitRNNCell(P, H, N)
    u = random(*batch, P, dtype=torch.float32)
    h = cell(u)
    assert h.shape == (*batch, H)
    torch.testing.assert_close(h, cell(u, torch.zeros(*batch, H)))


# --- lengths --------------------------------------------------------------------------------------------------------

LENGTHS = [3, 5, 1, 5, 2]


def ragged(dtype=torch.float64):
    return [random(length, P, seed=i, dtype=dtype) for i, length in enumerate(LENGTHS)]


def padded(sequences, fill):
    u = torch.full((len(sequences), 9, P), fill, dtype=sequences[0].dtype)
    for row, sequence in zip(u, sequences, strict=True):
        row[: len(sequence)] = sequence
    return u


@over_all
def test_each_sequence_of_a_batch_is_what_it_is_alone(options):
    model = model_of(options, return_sequence=True)
    sequences = ragged()
    h0 = random(len(model.cells), len(LENGTHS), H, seed=8)
    y, h = model(padded(sequences, math.nan), h0, LENGTHS, return_state=True)
    packed_y, packed_h = model(pack_sequence(sequences, enforce_sorted=False), h0, return_state=True)
    close(packed_h, h)
    for i, sequence in enumerate(sequences):
        alone, alone_h = model(sequence[None], h0[:, i : i + 1], return_state=True)
        close(y[i, : len(sequence)], alone[0])
        close(h[:, i], alone_h[:, 0])
        assert bool((y[i, len(sequence) :] == 0).all())
    unpacked, lengths = pad_packed_sequence(packed_y, batch_first=True)
    assert lengths.tolist() == LENGTHS
    close(unpacked, y[:, :5])
    model.return_sequence = False
    last = model(padded(sequences, 5.0), h0, torch.tensor(LENGTHS))
    alone = torch.stack([model(s[None], h0[:, i : i + 1])[0] for i, s in enumerate(sequences)])
    close(last, alone)


@over_all
def test_padding_never_changes_a_gradient(options):
    model = model_of(options)
    sequences = ragged()

    def gradients(y, leaves):
        return torch.autograd.grad(y.square().sum(), leaves)

    parameters = list(model.parameters())
    u = padded(sequences, 7.0).requires_grad_()
    by_u, *by_parameters = gradients(model(u, lengths=LENGTHS), [u, *parameters])
    for i, length in enumerate(LENGTHS):
        assert bool((by_u[i, length:] == 0).all())
    leaves = [s.requires_grad_() for s in sequences]
    *by_sequence, _ = gradients(model(pack_sequence(leaves, enforce_sorted=False)), [*leaves, parameters[0]])
    totals = [torch.zeros_like(p) for p in parameters]
    for i, sequence in enumerate(leaves):
        close(by_u[i, : LENGTHS[i]], by_sequence[i])
        for total, g in zip(totals, gradients(model(sequence[None]), parameters), strict=True):
            total += g
    for ours, total in zip(by_parameters, totals, strict=True):
        close(ours, total)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_sorted_pack_and_one_without_indices_work(bidirectional):
    model = model_of({"bidirectional": bidirectional, **TIGHT}, return_sequence=True)
    sequences = sorted(ragged(), key=len, reverse=True)
    packed = pack_sequence(sequences)
    assert packed.sorted_indices is None
    y = model(packed)
    assert isinstance(y, PackedSequence)
    lengths = [len(s) for s in sequences]
    close(pad_packed_sequence(y, batch_first=True)[0], model(padded(sequences, 0.0), lengths=lengths)[:, :5])


def test_the_solution_says_nothing_failed_where_a_sequence_has_ended():
    model = model_of(TIGHT)
    _, solution = model(padded(ragged(), math.nan), lengths=LENGTHS, return_solution=True)
    assert solution.x.shape == (1, 5, 9, N)
    assert solution.residual.shape == solution.steps.shape == solution.converged.shape == (1, 5, 9)
    assert bool(solution.converged.all())
    for i, length in enumerate(LENGTHS):
        assert bool((solution.x[0, i, length:] == 0).all())
        assert bool((solution.steps[0, i, length:] == 0).all())
        assert bool((solution.steps[0, i, :length] > 0).all())


# --- shapes ---------------------------------------------------------------------------------------------------------


@over_few
def test_time_first_is_the_same_with_two_axes_exchanged(options):
    batch_first, time_first = (model_of(options, batch_first=b, return_sequence=True) for b in (True, False))
    u = random(3, 6, P)
    close(time_first(u.transpose(0, 1)), batch_first(u).transpose(0, 1))
    close(time_first(u.transpose(0, 1), lengths=[2, 6, 4]), batch_first(u, lengths=[2, 6, 4]).transpose(0, 1))


@over_few
def test_a_single_sequence_needs_no_batch(options):
    for return_sequence in (False, True):
        model = model_of(options, return_sequence=return_sequence)
        u, h0 = random(6, P), random(len(model.cells), H, seed=2)
        y, h, solution = model(u, h0, return_state=True, return_solution=True)
        many, many_h, many_solution = model(u[None], h0[:, None], return_state=True, return_solution=True)
        close(y, many[0])
        close(h, many_h[:, 0])
        close(solution.x, many_solution.x[:, 0])
        assert solution.steps.shape == (len(model.cells), 6)


@over_few
@pytest.mark.parametrize("return_sequence", [False, True])
def test_an_empty_batch_gives_an_empty_result_with_zero_gradients(options, return_sequence):
    model = model_of(options, return_sequence=return_sequence)
    u = torch.empty(0, 6, P, dtype=torch.float64, requires_grad=True)
    y, h, solution = model(u, return_state=True, return_solution=True)
    assert y.shape == ((0, 6, Q) if return_sequence else (0, Q))
    assert h.shape == (len(model.cells), 0, H)
    assert solution.residual.shape == (len(model.cells), 0, 6)
    y.sum().backward()
    assert all(bool((p.grad == 0).all()) for p in model.parameters() if p.grad is not None)
    assert model(u, lengths=[]).shape == y.shape


def test_a_sequence_of_one_time_is_a_step():
    model = model_of(TIGHT)
    u = random(3, 1, P).requires_grad_()
    y, truth = model(u), by_steps(model, u)[0]
    close(y, truth)
    close(torch.autograd.grad(y.sum(), u)[0], torch.autograd.grad(truth.sum(), u)[0])


# --- the gradient contract ------------------------------------------------------------------------------------------


def pure(model, lengths=None):
    """Return the model as a function of its input, its first state and its parameters, and these."""
    named = dict(model.named_parameters())

    def function(u, h0, *values):
        weights = dict(zip(named, values, strict=True))
        return functional_call(model, weights, (u, h0, lengths), {"return_state": True})

    u, h0 = random(2, 3, P), 0.5 * random(len(model.cells), 2, H, seed=2)
    return function, [t.detach().clone().requires_grad_() for t in (u, h0, *named.values())]


SMOOTH = {name: o for name, o in OPTIONS.items() if name not in ("PReLU", "no direct term")}


CHECKED = [(name, [1, 3]) for name in SMOOTH] + [
    (name, None) for name in ("default", "rank 2", "silu", "bidirectional")
]


@pytest.mark.parametrize(("name", "lengths"), CHECKED, ids=str)
def test_first_and_second_derivatives_agree_with_finite_differences(name, lengths):
    options = SMOOTH[name]
    function, leaves = pure(model_of(options, return_sequence=True), lengths)
    settings = {"eps": 1e-6, "atol": 1e-5, "fast_mode": True, "check_undefined_grad": False}
    # torch cannot nest its forward mode in a dual level, so that maps known only as functions do not offer the latter.
    forward = model_of(options).cells[0].f.activation.derivative is not None
    assert gradcheck(function, leaves, check_forward_ad=forward, **settings)
    assert gradgradcheck(function, leaves, **settings)


@pytest.mark.parametrize("return_sequence", [False, True])
@over_few
def test_undefined_gradients_are_zeros(options, return_sequence):
    function, leaves = pure(model_of(options, return_sequence=return_sequence), [1, 3])
    assert gradcheck(function, leaves, eps=1e-6, atol=1e-5, fast_mode=True, check_undefined_grad=True)


@over_few
def test_jacobians_of_both_modes_and_hessian_vector_products_agree(options):
    function, leaves = pure(model_of(options), [1, 3])
    tensors = [leaf.detach() for leaf in leaves]
    every = tuple(range(len(tensors)))

    def output(*tensors):
        return function(*tensors)[0]

    for reverse, forward in zip(jacrev(output, every)(*tensors), jacfwd(output, every)(*tensors), strict=True):
        close(reverse, forward)

    def loss(*tensors):
        return output(*tensors).square().sum()

    directions = tuple(random(*t.shape, seed=7) for t in tensors)
    _, forward_over_reverse = jvp(grad(loss, every), tuple(tensors), directions)
    reverse_over_forward = grad(lambda *t: jvp(loss, t, directions)[1], every)(*tensors)
    _, truth = torch.autograd.functional.vhp(loss, tuple(tensors), directions)
    for one, other, true in zip(forward_over_reverse, reverse_over_forward, truth, strict=True):
        close(one, true)
        close(other, true)


@over_few
def test_per_sample_gradients_are_those_of_each_sample_alone(options):
    model = model_of(options)
    parameters, u = dict(model.named_parameters()), random(3, 5, P)

    def loss(parameters, u):
        return functional_call(model, parameters, (u,)).square().sum()

    together = vmap(grad(loss), (None, 0))(parameters, u)
    for i, one in enumerate(u):
        for name, alone in grad(loss)(parameters, one).items():
            close(together[name][i], alone)


@over_few
def test_an_ensemble_of_models_is_a_loop_over_them(options):
    models = [model_of(options, seed=seed) for seed in (0, 1)]
    stacked = {name: torch.stack([dict(m.named_parameters())[name] for m in models]) for name in models[0].state_dict()}
    u = random(3, 5, P)
    together = vmap(lambda weights: functional_call(models[0], weights, (u,)))(stacked)
    for i, model in enumerate(models):
        close(together[i], model(u))


@either_way
def test_a_gradient_does_not_depend_on_the_scale_of_the_loss(parallel_in_time):
    model = model_of({"parallel_in_time": parallel_in_time}, torch.float32)
    u = random(4, 20, P, dtype=torch.float32)
    whole, tiny = (torch.autograd.grad(s * model(u).square().sum(), list(model.parameters())) for s in (1.0, 1e-8))
    for one, other in zip(whole, tiny, strict=True):
        assert relative_error(other.double() * 1e8, one) < 1e-4


@either_way
def test_a_vanishing_gradient_ends_at_zero_and_not_in_denormal_numbers(parallel_in_time):
    model = model_of({"activation": "tanh", "parallel_in_time": parallel_in_time}, torch.float32)
    with torch.no_grad():
        for p in model.cells.parameters():
            p.mul_(0.2)
    u = random(4, 200, P, dtype=torch.float32).requires_grad_()
    (g,) = torch.autograd.grad(model(u).sum(), u)
    assert bool((g[:, 0] == 0).all())
    assert bool((g[:, -1] != 0).any())


# --- under everything that torch does to a module -------------------------------------------------------------------


def outcome(model, u, call=None, **keywords):
    u = u.detach().requires_grad_()
    y = (model if call is None else call)(u, **keywords)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [u, *model.parameters()])]


def assert_near(values, truths, tolerance):
    assert [v.shape for v in values] == [t.shape for t in truths]
    assert relative_error(*(torch.cat([v.double().flatten() for v in many]) for many in (values, truths))) < tolerance


@over_all
def test_copies_pickles_saved_states_and_modes_give_the_same(options):
    model = model_of(options, torch.float32)
    u = random(3, 5, P, dtype=torch.float32)
    expected = outcome(model, u)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    restored = model_of(options, torch.float32, seed=5)
    restored.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), restored, model.eval()):
        for ours, theirs in zip(outcome(other, u), expected, strict=True):
            assert torch.equal(ours, theirs)


@over_all
def test_a_model_moves_to_bfloat16_as_a_whole_and_runs_under_autocast(options):
    options = {name: value for name, value in options.items() if name not in TIGHT}
    model = model_of(options, torch.bfloat16)
    u = random(6, 5, P, dtype=torch.bfloat16)
    values, truth = outcome(model, u), outcome(copy.deepcopy(model).float(), u.float())
    assert {v.dtype for v in values} == {torch.bfloat16}
    assert_near(values, truth, 2 * BFLOAT16)  # each time rounds its output
    model = model.float()
    truth = outcome(model, u.float())
    with torch.autocast("cpu", torch.bfloat16):
        values = outcome(model, u.float())
    assert values[0].dtype == torch.bfloat16
    assert {v.dtype for v in values[1:]} == {torch.float32}
    assert_near(values, truth, 2 * BFLOAT16)


@over_few
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:The .grad attribute")
def test_a_compiled_model_gives_the_same_values_and_gradients(options, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch.compiler.reset()
    model = model_of(options, torch.float32)
    compiled = torch.compile(model, backend="aot_eager")
    for seed in (1, 2):
        u = random(3, 5, P, seed=seed, dtype=torch.float32)
        for value, truth in zip(outcome(model, u, compiled), outcome(model, u), strict=True):
            torch.testing.assert_close(value, truth)
    for value, truth in zip(
        outcome(model, u, compiled, lengths=[2, 5, 3]), outcome(model, u, lengths=[2, 5, 3]), strict=True
    ):
        torch.testing.assert_close(value, truth)


def test_two_models_with_different_options_do_not_touch_each_other():
    options = [{"kappa": 0.3, "activation": "tanh"}, {"kappa": 0.9, "low_rank": True, "rank": 3}]
    u = random(3, 5, P, dtype=torch.float32)
    alone = [outcome(model_of(o, torch.float32), u) for o in options]
    models = [model_of(o, torch.float32) for o in options]
    for _ in range(2):
        for model, truth in zip(models, alone, strict=True):
            for value, true in zip(outcome(model, u), truth, strict=True):
                assert torch.equal(value, true)


def test_inference_mode_and_no_grad_give_the_same_value():
    model = model_of(TIGHT)
    u = random(3, 5, P)
    expected = model(u)
    with torch.inference_mode():
        close(model(u), expected)
    with torch.no_grad():
        close(model(u), expected)


def kept(options, mitr, row_sum=0.95):
    """Return the bytes of all storages that autograd saves in a forward, and the steps that were taken."""
    model = model_of({"f": ImplicitFunctionInf(mitr=mitr, tol=0.0, on_failure="ignore", **options)}, torch.float32)
    with torch.no_grad():
        model.cells[0].model.A.fill_(row_sum / N)
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y, solution = model(random(8, 20, P, dtype=torch.float32), return_solution=True)
    y.sum().backward()
    return sum(storage.nbytes() for storage in storages.values()), int(solution.steps.max())


def test_memory_does_not_grow_with_the_number_of_iterations():
    (few, few_steps), (many, many_steps) = kept({}, 5), kept({}, 60)
    assert many_steps > few_steps + 4  # the comparison means something
    assert many == few
    rows = 8 * 20
    # x_t, h_{t-1} and the input; what is left are matrices.
    assert few <= 4 * (rows * (N + H + P) + 2000)


def test_a_result_frees_its_graph_when_it_is_dropped():
    model = model_of({}, torch.float32)
    y, solution = model(random(3, 5, P, dtype=torch.float32), return_solution=True)
    node = weakref.ref(solution.x)
    del y, solution
    assert node() is None


# --- hard equilibria ------------------------------------------------------------------------------------------------


def stiff(options=None, row_sum=0.99, n=60, dtype=torch.float32):
    """A model whose state feeds itself positively, with row sums that leave it hardly contracting."""
    torch.manual_seed(0)
    model = ImplicitRNN(2, 1, 12, n, **(options or {})).to(dtype)
    with torch.no_grad():
        A = model.cells[0].model.A.abs_()
        A.mul_(row_sum / A.sum(1, keepdim=True))
        model.cells[0].model.C.div_(30)  # what comes out is large, and is read again
    return model


@either_way
@pytest.mark.parametrize("smooth", [False, True])
def test_a_stiff_model_is_as_exact_as_it_says(smooth, parallel_in_time):
    options = {"tol": 1e-8, "mitr": 3000, "return_sequence": True, "parallel_in_time": parallel_in_time}
    model = stiff(dtype=torch.float64, options=options)
    u = random(16, 40, 2)
    if smooth:  # hardly anything changes from time to time, so that a test of the last steps is easily fooled
        u = 1 + 1e-3 * u.cumsum(1)
    y, solution = model(u, return_solution=True)
    exact = copy.deepcopy(model)
    exact.cells[0].model.f.solver = Newton(1e-13, 0.0, 3000)
    true_y, true = exact(u, return_solution=True)
    assert bool(solution.converged.all())
    # Errors of x enter h and come back; the map from h to h does not amplify them by more than this.
    assert float((solution.x - true.x).detach().abs().max()) <= 1e-8 * 100
    assert float((y - true_y).detach().abs().max()) <= 1e-8 * 100
    assert float(true.x.detach().abs().max()) > 1


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("row_sum", [0.5, 0.9, 0.99])
def test_an_error_that_hardly_changing_inputs_hide_is_not_left_over(row_sum, activation):
    tol, n, times, batch = 1e-6, 40, 48, 32
    worst = 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        model = ImplicitRNN(2, 1, 10, n, activation=activation, tol=tol, mitr=3000, kappa=0.9999).double()
        matrices = model.cells[0].model
        with torch.no_grad():
            A = random(n, n, seed=seed).abs()
            matrices.A.copy_(A * row_sum / A.sum(1, keepdim=True))
            matrices.C.mul_(1.02 - row_sum)
            matrices.D.mul_(0.5)
            drift = torch.linspace(0, 1e-3, times, dtype=torch.float64)[None, :, None]
            u = 1 + drift + 0.5 * random(batch, 1, 2, seed=seed + 9)
            _, solution = model(u, return_solution=True)
            h = solution.x[0] @ matrices.C.T  # the outputs that the states were computed from, again from them
            outputs = [u.new_zeros(batch, 10)]
            for t in range(times):
                both = torch.cat((u[:, t], outputs[-1]), 1)
                outputs.append(h[:, t] + both @ matrices.D.T)
            both = torch.cat((u, torch.stack(outputs[:-1], 1)), -1)
            exact = ImplicitFunctionInf(activation=activation, kappa=0.9999, solver=Newton(1e-13, 0.0, 3000))
            error = solution.x[0] - exact(matrices.A, matrices.B, both)
        assert bool(solution.converged.all())
        worst = max(worst, float(error.abs().max()))
    assert worst < 1.5 * tol


@either_way
@pytest.mark.parametrize("rows", [0.9, 0.99, 0.999])
def test_float32_states_of_stiff_models_converge_or_are_reported(rows, parallel_in_time):
    model = stiff({"kappa": 0.9999, "parallel_in_time": parallel_in_time}, rows)
    u = random(16, 30, 2, dtype=torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, solution = model(u, return_solution=True)
    assert bool(solution.converged.all()) == (len(caught) == 0)
    truth = copy.deepcopy(model).double()
    truth.cells[0].model.f = ImplicitFunctionInf(tol=1e-12, mitr=5000, kappa=0.9999)
    _, true = truth(u.double(), return_solution=True)
    size = float(true.x.detach().abs().max())
    error = (solution.x.double() - true.x).detach().abs().amax(-1)
    assert float(error[solution.converged].max()) <= 2e-4 * size


@either_way
def test_a_stiff_gradient_is_that_of_the_steps(parallel_in_time):
    options = {**TIGHT, "mitr": 5000, "grad_mitr": 5000, "parallel_in_time": parallel_in_time}
    model = stiff(options, dtype=torch.float64, n=20)
    u = random(4, 12, 2).requires_grad_()
    leaves = [u, *model.parameters()]
    gradients = (torch.autograd.grad(y.square().sum(), leaves) for y in (model(u), by_steps(model, u)[0]))
    for ours, theirs in zip(*gradients, strict=True):
        assert relative_error(ours, theirs) < 1e-8


@pytest.mark.parametrize("own", [0.9, 0.99])
def test_units_that_feed_themselves_are_solved_for_their_own_part(own):
    model = model_of({"implicit_hidden_dim": 8, "kappa": 0.995, **TIGHT}, return_sequence=True)
    with torch.no_grad():
        model.cells[0].model.A.mul_(0.002).fill_diagonal_(own)
        model.cells[0].model.C.mul_(0.01)
    u = random(3, 6, P).requires_grad_()
    y, solution = model(u, return_solution=True)
    truth = by_steps(model, u)[1]
    close(y, truth, 1e-8)
    assert int(solution.steps.max()) < 60  # a plain iteration would take log(1e-13) / log(.99)
    leaves = [u, *model.parameters()]
    gradients = (torch.autograd.grad(value.square().sum(), leaves) for value in (y, truth))
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs, 1e-7)


def test_a_model_that_does_not_converge_says_so_once_and_stays_finite():
    model = model_of({"f": ImplicitFunction(mitr=20)}, torch.float32, implicit_hidden_dim=6)
    with torch.no_grad():
        model.cells[0].model.A.fill_(0.4)
        model.cells[0].model.B.abs_()
        model.cells[0].model.C.mul_(1e-3)
    with pytest.warns(ConvergenceWarning, match=r"of 15 states, in 3 of 3 sequences") as caught:
        y, solution = model(random(3, 5, P, dtype=torch.float32).abs(), return_solution=True)
    assert len(caught) == 1
    assert "max row sum of |A| is 2.4" in str(caught[0].message)
    assert bool(y.isfinite().all())
    assert not bool(solution.converged.any())
    model.cells[0].model.f.on_failure = "ignore"
    model(random(3, 5, P, dtype=torch.float32).abs())
    model.cells[0].model.f.on_failure = "raise"
    with pytest.raises(ConvergenceError):
        model(random(3, 5, P, dtype=torch.float32).abs())


def test_a_sequence_that_is_solved_step_by_step_warns_once_as_well():
    model = model_of({"f": ImplicitFunction(mitr=20, activation=nn.functional.relu)}, torch.float32)
    with torch.no_grad():
        model.cells[0].model.A.fill_(0.5)
        model.cells[0].model.B.abs_()
        model.cells[0].model.C.mul_(1e-3)
    with pytest.warns(ConvergenceWarning, match="samples") as caught:
        model(random(3, 5, P, dtype=torch.float32).abs())
    assert len(caught) == 1


@either_way
def test_no_state_takes_more_steps_than_it_may(parallel_in_time):
    for mitr in (1, 2, 3, 7, 15):
        options = {"mitr": mitr, "grad_mitr": mitr, "activation": "tanh", "parallel_in_time": parallel_in_time}
        model = model_of(options, torch.float32)
        model.cells[0].model.f.on_failure = "ignore"
        _, solution = model(random(3, 9, P, dtype=torch.float32), return_solution=True)
        assert int(solution.steps.max()) <= max(mitr, 3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "tanh"},
        {"activation": torch.sin},
        {"low_rank": True, "rank": 2},
        {"parallel_in_time": True, "activation": "tanh"},
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sequence_that_is_not_finite_is_lost_from_there_on_and_the_others_are_not(value, options):
    model = model_of(options, torch.float32, return_sequence=True)
    u = random(4, 9, P, dtype=torch.float32)
    expected = model(u)
    u[2, 4, 1] = value
    with pytest.warns(ConvergenceWarning) as caught:
        y, solution = model(u, return_solution=True)
    assert len(caught) == 1
    torch.testing.assert_close(y[[0, 1, 3]], expected[[0, 1, 3]], rtol=0, atol=FLOAT32)
    torch.testing.assert_close(y[2, :4], expected[2, :4], rtol=0, atol=FLOAT32)
    assert bool(y[2, 4:].isnan().all())
    assert bool(solution.converged[0, [0, 1, 3]].all())
    assert bool(solution.converged[0, 2, :4].all())
    assert not bool(solution.converged[0, 2, 4:].any())


@either_way
def test_a_recurrence_that_overflows_ends_in_numbers_or_in_a_warning(parallel_in_time):
    sizes = {"input_dim": 1, "output_dim": 1, "hidden_dim": 1, "implicit_hidden_dim": 1, "activation": "identity"}
    model = model_of({**sizes, "kappa": 0.9999, **TIGHT, "parallel_in_time": parallel_in_time})
    matrices = model.cells[0].model
    with torch.no_grad():
        matrices.A.fill_(2.0)
        matrices.B.copy_(torch.tensor([[0.5, 0.16]]))
        matrices.C.fill_(0.18)
        matrices.D.zero_()
    for times in (60, 118, 130):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            output = model(torch.full((1, times, 1), 1e30, dtype=torch.float64))
        assert all(warning.category is ConvergenceWarning for warning in caught)
        assert bool(output.isfinite().all()) or caught


# --- the solution ---------------------------------------------------------------------------------------------------


@over_few
def test_the_solution_measures_each_state(options):
    options = {name: value for name, value in options.items() if name not in TIGHT}
    model = model_of(options, torch.float32)
    u = random(4, 9, P, dtype=torch.float32)
    _, solution = model(u, return_solution=True)
    assert solution.x.shape == (len(model.cells), 4, 9, N)
    assert bool((solution.residual < 1e-5).all())
    assert bool(solution.converged.all())
    assert bool((solution.steps >= 2).all())
    exact = model_of({**options, **TIGHT}, torch.float64)
    exact.load_state_dict(model.state_dict())
    _, truth = exact(u.double(), return_solution=True)
    error = (solution.x.double() - truth.x).detach().abs().amax(-1)
    assert float(error.max()) < 1e-4
    if model.cells[0].f.contraction is None:
        assert solution.error_bound is None
    else:
        assert bool((solution.error_bound >= solution.residual).all())


# --- bad input ------------------------------------------------------------------------------------------------------

CONSTRUCTIONS = [
    ({"input_dim": 0}, ValueError, ["`input_dim`", "got 0"]),
    ({"output_dim": -1}, ValueError, ["`output_dim`", "got -1"]),
    ({"hidden_dim": 2.5}, TypeError, ["`hidden_dim`", "got 2.5"]),
    ({"implicit_hidden_dim": "5"}, TypeError, ["`implicit_hidden_dim`", "got '5'"]),
    ({"num_layers": 0}, ValueError, ["`num_layers`", "got 0"]),
    ({"bidirectional": "yes"}, TypeError, ["`bidirectional`", "True or False", "got 'yes'"]),
    ({"batch_first": 1}, TypeError, ["`batch_first`", "True or False", "got 1"]),
    ({"return_sequence": None}, TypeError, ["`return_sequence`", "True or False", "got None"]),
    ({"parallel_in_time": 1}, TypeError, ["`parallel_in_time`", "True or False", "got 1"]),
    ({"low_rank": True}, ValueError, ["`rank`", "got None"]),
    ({"low_rank": True, "rank": 6}, ValueError, ["`rank`", "implicit_hidden_dim=5", "got 6"]),
    ({"rank": 2}, ValueError, ["`rank`", "low_rank=True"]),
    ({"kappa": 1.0}, ValueError, ["`kappa`", "got 1.0"]),
    ({"tol": -1.0}, ValueError, ["`tol`", "got -1.0"]),
    ({"activation": "rleu"}, ValueError, ["`activation`", "got 'rleu'"]),
    ({"f": "inf"}, TypeError, ["`f`", "got 'inf'"]),
]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(("options", "kind", "words"), CONSTRUCTIONS, ids=[str(row[0]) for row in CONSTRUCTIONS])
def test_a_setting_that_does_not_fit_is_named_when_the_model_is_built(options, kind, words):
    with pytest.raises(kind) as caught:
        model_of(options)
    assert [w for w in words if w not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize("name", ["num_layer", "dropout", "return_sequences"])
def test_a_misspelt_setting_is_refused(name):
    with pytest.raises(TypeError, match=name):
        ImplicitRNN(P, Q, H, N, **{name: 1})


U = torch.ones(4, 6, P)
CALLS = [
    ("no time", (U[:, :0],), {}, ValueError, ["`u`", "at least one time", "(4, 0, 3)"]),
    ("no time in a single one", (U[0, :0],), {}, ValueError, ["`u`", "at least one time", "(0, 3)"]),
    ("another size", (U[..., :2],), {}, ValueError, ["`u`", "(batch, time, 3)", "(4, 6, 2)"]),
    ("one axis", (U[0, 0],), {}, ValueError, ["`u`", "(batch, time, 3)", "(3,)"]),
    ("four axes", (U[None],), {}, ValueError, ["`u`", "(batch, time, 3)", "(1, 4, 6, 3)"]),
    ("a list", ([1.0],), {}, TypeError, ["`u`", "torch.Tensor", "list"]),
    ("integers", (U.long(),), {}, TypeError, ["`u`", "int64", "u.float()"]),
    ("float64", (U.double(),), {}, TypeError, ["`u`", "float64", "float32"]),
    ("h0 of another batch", (U, torch.zeros(1, 3, H)), {}, ValueError, ["`h0`", "(1, 4, 4)", "(1, 3, 4)"]),
    ("h0 without layers", (U, torch.zeros(4, H)), {}, ValueError, ["`h0`", "(1, 4, 4)", "layers", "(4, 4)"]),
    ("h0 of another size", (U, torch.zeros(1, 4, N)), {}, ValueError, ["`h0`", "(1, 4, 4)", "(1, 4, 5)"]),
    ("h0 with a batch", (U[0], torch.zeros(1, 1, H)), {}, ValueError, ["`h0`", "(1, 4)", "(1, 1, 4)"]),
    ("h0 in float64", (U, torch.zeros(1, 4, H).double()), {}, TypeError, ["`h0`", "float64"]),
    ("h0 a list", (U, [0.0]), {}, TypeError, ["`h0`", "torch.Tensor", "list"]),
    ("a length of zero", (U,), {"lengths": [6, 0, 1, 2]}, ValueError, ["`lengths[1]`", ">= 1", "got 0"]),
    ("a negative length", (U,), {"lengths": [6, 1, -1, 2]}, ValueError, ["`lengths[2]`", ">= 1", "got -1"]),
    ("too long", (U,), {"lengths": [6, 7, 1, 2]}, ValueError, ["`lengths`", "at most 6", "got 7 at index 1"]),
    ("too few lengths", (U,), {"lengths": [6, 5]}, ValueError, ["`lengths`", "(4,)", "got (2,)"]),
    ("a matrix", (U,), {"lengths": torch.ones(4, 1).long()}, ValueError, ["`lengths`", "(4,)", "got (4, 1)"]),
    ("a real length", (U,), {"lengths": torch.ones(4)}, TypeError, ["`lengths`", "integers", "float32"]),
    ("a real length in a list", (U,), {"lengths": [1, 2.5, 1, 1]}, TypeError, ["`lengths[1]`", "got 2.5"]),
    ("a number", (U,), {"lengths": 5}, TypeError, ["`lengths`", "a tensor or a list", "int"]),
    ("lengths of one", (U[0],), {"lengths": [5]}, ValueError, ["`lengths`", "single sequence"]),
    ("both", (pack_sequence([U[0]]),), {"lengths": [6]}, ValueError, ["`lengths`", "PackedSequence"]),
    ("packed, another size", (pack_sequence([U[0, :, :2]]),), {}, ValueError, ["`u.data`", "(rows, 3)", "(6, 2)"]),
]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(("arguments", "keywords", "kind", "words"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_what_does_not_fit_is_named(arguments, keywords, kind, words):
    with pytest.raises(kind) as caught:
        model_of({}, torch.float32)(*arguments, **keywords)
    assert [w for w in words if w not in str(caught.value)] == [], str(caught.value)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("u", "h", "kind", "words"),
    [
        (torch.ones(4, 2), None, ValueError, ["`u`", "(..., 3)", "(4, 2)"]),
        (torch.ones(4, P), torch.ones(3, H), ValueError, ["`h`", "(4, 4)", "(3, 4)"]),
        (torch.ones(4, P), torch.ones(4, H).double(), TypeError, ["`h`", "float64"]),
        (torch.ones(4, P).long(), None, TypeError, ["`u`", "int64"]),
        ([1.0], None, TypeError, ["`u`", "list"]),
    ],
)
def test_what_does_not_fit_a_cell_is_named(u, h, kind, words):
    with pytest.raises(kind) as caught:
        ImplicitRNNCell(P, H, N)(u, h)
    assert [w for w in words if w not in str(caught.value)] == [], str(caught.value)


def test_repr_says_what_the_model_is():
    text = repr(model_of({"num_layers": 2, "return_sequence": True}))
    assert (
        "3, 2, 4, 5, num_layers=2, bidirectional=False, batch_first=True, return_sequence=True, parallel_in_time=False"
        in text
    )
    assert "ImplicitRNNCell" in text


def test_an_activation_with_a_state_of_its_own_is_saved_with_every_cell():
    model = model_of({"activation": nn.PReLU(), "num_layers": 2})
    assert sum("weight" in name and "phi" in name for name in model.state_dict()) == 2
