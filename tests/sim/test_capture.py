"""What is recorded of a teacher is what its forward pass, written out by hand, computes; and the teacher stays."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_modules
from torch.nn.utils import parametrizations

import oracles
from idl.errors import CaptureError
from idl.sim.capture import Teacher
from idl.sim.recording import record
from problems import random
from sim.teachers import KNOWN, MLP, SPELLINGS, seeded, spelled

ROUNDING = {"rtol": 1e-12, "atol": 1e-12}
"""A few float64 sums of some ten terms of size up to ten."""

BFLOAT16, HALF = 0.03, 4e-3
"""Rounding to 8 and 11 bits (0.004, 0.0005) of each of a few layers, relative to values of size up to one."""

every_teacher = pytest.mark.parametrize("known", KNOWN, ids=str)


def mlp_with(f):
    """A teacher of three linear layers ``a, b, c`` (6-5, 5-5, 5-3) whose forward pass is ``f(self, u)``."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, u):
            return f(self, u)

    return seeded(Net)


def example():
    return random(9, 6, seed=7)


# --- records --------------------------------------------------------------------------------------------------------


@every_teacher
def test_a_recording_is_the_forward_pass_written_by_hand(known):
    recording = Teacher(known.net, known.u).record(known.u)
    for value, true in zip(recording, known.recorded(), strict=True):
        torch.testing.assert_close(value, true, **ROUNDING)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_an_activation_is_recorded_and_replaced(spelling):
    known = spelled(spelling)
    teacher = Teacher(known.net, known.u)
    assert teacher.activation.name == known.kind
    # torch's softplus is linear from 20 on, which changes 2e-9 there; these pre-activations are smaller.
    U, Z, X, Y = known.recorded()
    for value, true in zip(teacher.record(known.u), (U, Z, X, Y), strict=True):
        torch.testing.assert_close(value, true, **ROUNDING)
    m = teacher.matrices()
    torch.testing.assert_close(X @ m.A.T + U @ m.B.T + m.b, Z, **ROUNDING)
    torch.testing.assert_close(X @ m.C.T + U @ m.D.T + m.d, Y, **ROUNDING)


@every_teacher
def test_moments_of_a_loader_are_those_of_the_forward_pass_written_by_hand(known):
    U, Z, X, Y = known.recorded()
    recorded = record(known.net, [known.u[:4], (known.u[4:], None)])
    S, T = torch.cat((X, U), 1), torch.cat((Z, Y), 1)
    torch.testing.assert_close(recorded.moments.gram, S.T @ S / len(S), **ROUNDING)
    torch.testing.assert_close(recorded.state_moments.cross, Z.T @ S / len(S), **ROUNDING)
    torch.testing.assert_close(recorded.output_moments.cross, Y.T @ S / len(S), **ROUNDING)
    torch.testing.assert_close(recorded.moments.energies, T.square().mean(0), **ROUNDING)
    assert (recorded.states, recorded.inputs) == (Z.shape[1], U.shape[1])


def test_a_teacher_is_biased_if_any_of_its_layers_is():
    u = example()
    for hidden, output in ((True, True), (True, False), (False, True), (False, False)):
        net = seeded(lambda h=hidden, o=output: nn.Sequential(nn.Linear(6, 5, h), nn.ReLU(), nn.Linear(5, 2, o)))
        assert record(net, [u]).biased == (hidden or output)


# --- matrices -------------------------------------------------------------------------------------------------------


@every_teacher
@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_matrices_are_exact_on_the_recorded_data(known, chunk):
    U, Z, X, Y = known.recorded()
    m = Teacher(known.net, known.u).matrices(chunk)
    torch.testing.assert_close(X @ m.A.T + U @ m.B.T + m.b, Z, **ROUNDING)
    torch.testing.assert_close(X @ m.C.T + U @ m.D.T + m.d, Y, **ROUNDING)


@every_teacher
def test_a_feed_forward_teacher_has_a_strictly_block_upper_triangular_matrix(known):
    A = Teacher(known.net, known.u).matrices().A
    start = 0
    for size in reversed(known.sizes):  # the last layer comes first and is read by nobody
        assert not bool(A[start:, start : start + size].any())
        start += size
    assert start == len(A)
    assert bool(A.any())


@every_teacher
def test_the_implicit_model_of_the_matrices_is_the_teacher(known):
    m, u = Teacher(known.net, known.u).matrices(), 3 * random(5, *known.shape, seed=11)
    U = u.flatten(1)

    def f(x):
        return oracles.PHI[known.kind](x @ m.A.T + U @ m.B.T + m.b)

    x = oracles.unrolled(f, torch.zeros(5, len(m.A), dtype=torch.float64), steps=len(known.sizes))
    with torch.no_grad():
        truth = copy.deepcopy(known.net).eval()(u)
    torch.testing.assert_close(x @ m.C.T + U @ m.D.T + m.d, truth.flatten(1), **ROUNDING)


def test_matrices_of_a_plain_network_are_its_weights():
    known = KNOWN[0]
    first, second, last = (known.net[i] for i in (0, 2, 4))
    m = Teacher(known.net, known.u).matrices()
    zeros = torch.zeros
    truth = (
        F.pad(second.weight, (4, 0, 0, 5)),  # Z is (second, first) and so is X
        torch.cat((zeros(4, 6, dtype=torch.float64), first.weight)),
        torch.cat((last.weight, zeros(3, 5, dtype=torch.float64)), 1),
        zeros(3, 6, dtype=torch.float64),
        torch.cat((second.bias, first.bias)),
        last.bias,
    )
    for value, true in zip(m, truth, strict=True):
        torch.testing.assert_close(value, true.detach(), **ROUNDING)


def test_the_weights_of_a_teacher_are_counted_without_biases_and_batch_norm():
    known = next(k for k in KNOWN if k.name == "convolutional")
    assert Teacher(known.net, known.u).weights == 3 * 9 + 2 * 3 * 4 + 3 * 2


# --- names ----------------------------------------------------------------------------------------------------------


@every_teacher
def test_layers_are_named_by_their_modules(known):
    teacher = Teacher(known.net, known.u)
    assert tuple(layer.name for layer in teacher.layers) == known.names
    assert [layer.units for layer in teacher.layers] == known.sizes


def test_a_subset_of_layers_is_recorded_in_the_order_of_the_network():
    known = next(k for k in KNOWN if k.name == "nested")
    U, Z, X, Y = known.recorded()
    for chosen in (("stem.1.0", "blocks.1.body.1"), ("blocks.1.body.1", "stem.1.0")):
        teacher = Teacher(known.net, known.u, chosen)
        assert [layer.name for layer in teacher.layers] == ["stem.1.0", "blocks.1.body.1"]
        truth = U, torch.cat((Z[:, :5], Z[:, 10:]), 1), torch.cat((X[:, :5], X[:, 10:]), 1), Y
        for value, true in zip(teacher.record(known.u), truth, strict=True):
            torch.testing.assert_close(value, true, **ROUNDING)
        assert teacher.matrices().A.shape == (15, 15)


@pytest.mark.parametrize("layers", [["1", "7"], ["relu"], [], "17"])
def test_an_unknown_name_is_refused_and_the_known_ones_are_listed(layers):
    with pytest.raises(ValueError, match=r"`layers` must be names among .*'1'.*'3'"):
        Teacher(KNOWN[0].net, KNOWN[0].u, layers)


def test_names_are_unique_whatever_the_modules_are_called():
    net = mlp_with(lambda self, u: self.c(self.relu(self.b(self.relu_1(self.a(u))))))
    net.relu, net.relu_1 = nn.ReLU(), nn.ReLU()
    names = [layer.name for layer in Teacher(net, example()).layers]
    assert len(set(names)) == 2


def test_a_module_whose_failure_is_caught_gives_no_name_to_what_comes_after():
    class Failing(nn.Module):
        def forward(self, x):
            raise KeyError

    def f(self, u):
        try:
            return self.failing(u)
        except KeyError:
            return self.c(F.relu(self.a(u)))

    net = mlp_with(f)
    net.failing = Failing()
    assert [layer.name for layer in Teacher(net, example()).layers] == ["relu"]


# --- the teacher stays as it was ------------------------------------------------------------------------------------


def everything_about(net):
    """All that a user may notice of a module, and of torch beside it."""
    return {
        "state": {name: value.clone() for name, value in net.state_dict().items()},
        "modes": [m.training for m in net.modules()],
        "requires_grad": [p.requires_grad for p in net.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        "hooks": [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in net.modules()],
        "global hooks": [
            list(hooks)
            for hooks in (
                torch_modules._global_forward_hooks,
                torch_modules._global_forward_pre_hooks,
                torch_modules._global_forward_hooks_always_called,
                torch_modules._global_forward_hooks_with_kwargs,
            )
        ],
        "modes of torch": torch.overrides._len_torch_function_stack(),
        "gradients are on": torch.is_grad_enabled(),
        "random numbers": torch.get_rng_state(),
    }


def assert_nothing_changed(net, before):
    torch.testing.assert_close(everything_about(net), before, rtol=0, atol=0)


@pytest.fixture
def mixed_teacher():
    """A convolutional teacher with submodules in both modes, a frozen parameter, gradients, and hooks of its own."""
    net = copy.deepcopy(next(k.net for k in KNOWN if k.name == "convolutional")).train()
    net.features[1].eval()
    net.head.weight.requires_grad_(False)
    net(random(4, 1, 4, 4, seed=1)).sum().backward()
    calls = []
    net.features.register_forward_hook(lambda *_: calls.append(1))
    torch_modules.register_module_forward_hook(lambda *_: None).remove()
    return net


def test_a_teacher_is_left_as_it_was(mixed_teacher):
    before = everything_about(mixed_teacher)
    assert len(set(before["modes"])) == 2
    assert {g is None for g in before["grads"]} == {True, False}
    u = random(9, 1, 4, 4, seed=7)
    record(mixed_teacher, [u, u])
    assert_nothing_changed(mixed_teacher, before)


@pytest.mark.parametrize("moment", ["in the example", "later"])
def test_a_teacher_that_fails_is_left_as_it_was(moment, mixed_teacher):
    u = random(9, 1, 4, 4, seed=7)
    teacher = Teacher(mixed_teacher, u)

    class Failing(nn.Module):
        def forward(self, x):
            raise KeyError("no way on")

    mixed_teacher.features[3] = Failing()
    before = everything_about(mixed_teacher)
    for call in (lambda: teacher.record(u), teacher.matrices, lambda: Teacher(mixed_teacher, u)):
        with pytest.raises(KeyError, match="no way on"):
            call()
        assert_nothing_changed(mixed_teacher, before)


def test_a_teacher_that_has_no_eval_mode_leaves_no_hook_behind():
    class Stubborn(nn.Linear):
        def train(self, mode=True):
            if not mode:
                raise RuntimeError("always training")
            return super().train(mode)

    net = nn.Sequential(nn.ReLU(), Stubborn(6, 5).double())
    before = everything_about(net)
    try:
        with pytest.raises(RuntimeError, match="always training"):
            Teacher(net, example())
        assert_nothing_changed(net, before)
    finally:  # for the other tests
        torch_modules._global_forward_hooks.clear()
        torch_modules._global_forward_pre_hooks.clear()
        torch_modules._global_forward_hooks_always_called.clear()


def test_a_refused_teacher_is_left_as_it_was():
    net = mlp_with(lambda self, u: self.c(F.relu(self.a(u))).softmax(1))
    before = everything_about(net)
    with pytest.raises(CaptureError):
        Teacher(net, example())
    assert_nothing_changed(net, before)


def test_hooks_of_the_teacher_and_of_all_modules_see_what_they_saw():
    net = mlp_with(lambda self, u: self.c(F.relu(self.a(u))))
    seen, everywhere = [], []
    net.a.register_forward_hook(lambda m, args, out: seen.append(out.clone()))
    handle = torch_modules.register_module_forward_hook(lambda m, args, out: everywhere.append(type(m).__name__))
    try:
        teacher = Teacher(net, example())
        seen.clear(), everywhere.clear()
        teacher.record(example())
    finally:
        handle.remove()
    torch.testing.assert_close(seen, [F.linear(example(), net.a.weight, net.a.bias)])
    assert everywhere == ["Linear", "Linear", "Net"]


@pytest.mark.parametrize(
    "f",
    [
        lambda self, u: self.c(F.relu(self.a(F.relu(u, inplace=True)))),
        lambda self, u: self.c(F.relu(self.a(u.sub_(0.5).div_(2)))),
    ],
    ids=["an activation of the input", "its normalisation"],
)
def test_a_teacher_that_works_in_place_on_its_inputs_is_recorded_with_the_inputs_it_got(f):
    net, u = mlp_with(f), example()
    recording = Teacher(net, u).record(u)
    torch.testing.assert_close(recording.U, example(), rtol=0, atol=0)
    torch.testing.assert_close(u, example(), rtol=0, atol=0)


def test_a_recording_has_no_gradient_and_does_not_share_memory_with_the_next_one():
    known = spelled("nn.ReLU(inplace=True)")
    teacher = Teacher(known.net, known.u)
    first = teacher.record(known.u)
    kept = [part.clone() for part in first]
    teacher.record(-known.u)
    for part, before in zip(first, kept, strict=True):
        assert not part.requires_grad
        torch.testing.assert_close(part, before, rtol=0, atol=0)


# --- what has no place in an implicit model -------------------------------------------------------------------------

REFUSED = {
    "max_pool2d": (lambda self, u: self.c(F.max_pool2d(F.relu(self.a(u))[:, None, None], (1, 3), 1, (0, 1))[:, 0, 0])),
    "max_pool1d": (lambda self, u: self.c(F.max_pool1d(F.relu(self.a(u))[:, None], 3, 1, 1)[:, 0])),
    "softmax": (lambda self, u: F.softmax(self.c(F.relu(self.a(u))), 1)),
    "log_softmax": (lambda self, u: F.log_softmax(self.c(F.relu(self.a(u))), 1)),
    "gelu": (lambda self, u: self.c(F.relu(self.b(F.gelu(self.a(u)))))),
    "elu": (lambda self, u: self.c(F.relu(self.b(F.elu(self.a(u)))))),
    "layer_norm": (lambda self, u: self.c(F.relu(F.layer_norm(self.a(u), (5,))))),
    "mul": (lambda self, u: self.c(F.relu(self.b(F.relu(self.a(u)))) * F.relu(self.a(u)))),
    "abs": (lambda self, u: self.c(F.relu(self.a(u))).abs()),
    "clamp": (lambda self, u: self.c(F.relu(self.b(self.a(u).clamp(min=0))))),
    "dropout": (lambda self, u: self.c(F.dropout(F.relu(self.a(u))))),
    "relu and tanh": (lambda self, u: self.c(F.relu(self.b(torch.tanh(self.a(u)))))),
    "relu and sigmoid": (lambda self, u: self.c(F.relu(self.a(u))).sigmoid()),
    "tuple": (lambda self, u: (self.c(F.relu(self.a(u))), u)),
    "none of the activations .*gelu": (lambda self, u: self.c(F.gelu(self.a(u)))),
    "none of the activations .*linear": (lambda self, u: self.c(self.a(u))),
    r"leaky_relu with the settings \[0.2\]": (lambda self, u: self.c(F.leaky_relu(self.a(u), 0.2))),
    r"leaky_relu with the settings \[0.1\]": (lambda self, u: self.c(nn.LeakyReLU(0.1, inplace=True)(self.a(u)))),
    r"softplus with the settings \[2": (lambda self, u: self.c(F.softplus(self.a(u), beta=2))),
    r"softplus with the settings \[0.01": (lambda self, u: self.c(F.softplus(self.a(u), beta=0.01))),
    "first dimension must be the batch": (lambda self, u: self.c(F.relu(self.a(u).T).T)),
}


@pytest.mark.parametrize("operation", REFUSED)
def test_an_operation_without_a_place_is_refused_and_named(operation):
    with pytest.raises(CaptureError, match=operation):
        Teacher(mlp_with(REFUSED[operation]), example())


@pytest.mark.parametrize("tail", [nn.Softmax(1), nn.LogSoftmax(1), nn.ReLU6(), nn.GELU()], ids=repr)
def test_an_operation_without_a_place_is_refused_whatever_the_weights(tail):
    accepted = []
    for seed in range(60):
        net = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), tail), seed)
        try:
            Teacher(net, example())
        except CaptureError:
            continue
        accepted.append(seed)
    assert accepted == []


def test_an_operation_that_is_affine_around_zero_but_not_on_the_data_is_refused():
    net = mlp_with(lambda self, u: F.hardtanh(self.c(F.relu(self.a(u))), -20, 20))
    u = 100 * example()
    assert float(net(u).detach().abs().max()) == 20
    with pytest.raises(CaptureError, match="hardtanh"):
        Teacher(net, u)


@pytest.mark.parametrize(
    "f",
    [
        lambda self, u: self.c(F.relu(self.a(u) - self.a(u).mean(0))),
        lambda self, u: self.c(F.relu(F.batch_norm(self.a(u), None, None, training=True))),
        lambda self, u: self.c(F.relu(self.a(u))) @ self.c(F.relu(self.a(u))).T @ u,
    ],
    ids=["mean of the batch", "batch norm without statistics", "attention over the batch"],
)
def test_a_teacher_whose_samples_depend_on_each_other_is_refused(f):
    with pytest.raises(CaptureError):
        Teacher(mlp_with(f), example())


@pytest.mark.parametrize(
    "f",
    [lambda self, u: self.c(F.relu(self.a(u))).mean(), lambda self, u: self.c(F.relu(self.a(u))).mean(0)],
    ids=["a number", "a mean"],
)
def test_an_output_that_is_not_one_for_each_sample_is_refused(f):
    with pytest.raises(CaptureError):
        Teacher(mlp_with(f), example())


def test_one_number_for_each_sample_is_an_output():
    net = mlp_with(lambda self, u: self.c(F.relu(self.a(u)))[:, 0])
    recording = Teacher(net, example()).record(example())
    torch.testing.assert_close(recording.Y, net(example()).detach()[:, None], **ROUNDING)


def test_default_settings_may_be_written_out():
    for phi in (lambda z: F.softplus(z, beta=1), lambda z: F.softplus(z, 1.0, 20.0), lambda z: F.leaky_relu(z, 0.01)):
        assert Teacher(seeded(lambda phi=phi: MLP(phi)), example()).activation.name in ("softplus", "leaky_relu")


def test_affine_operations_of_many_kinds_are_allowed():
    def f(self, u):
        x = F.relu(self.a(u))
        x = torch.cat((x, 2 * x), 1)[:, 3:8].unsqueeze(1).transpose(1, 2).squeeze(2) / 3 - 1
        x = F.relu(torch.einsum("bi,oi->bo", x, self.b.weight) + x.sum(1, keepdim=True))
        return self.c(F.pad(x.reshape(-1, 5, 1), (0, 1)).mean(2).view(-1, 5))

    net = mlp_with(f)
    u = example()
    U, Z, X, Y = Teacher(net, u).record(u)
    m = Teacher(net, u).matrices()
    torch.testing.assert_close(X @ m.A.T + U @ m.B.T + m.b, Z, **ROUNDING)
    torch.testing.assert_close(X @ m.C.T + U @ m.D.T + m.d, Y, **ROUNDING)
    torch.testing.assert_close(Y, net(u).detach(), **ROUNDING)


def _assigned(x):
    y = torch.zeros_like(x)
    y[:, :2] = x[:, 3:]
    return y


MASK = torch.tensor([True, False, True, False, True])

AFFINE = {
    "assignment to a part": _assigned,
    "where with a constant mask": lambda x: torch.where(MASK, x, 1.0),
    "masked_fill": lambda x: x.masked_fill(MASK, 0.0),
    "cumsum": lambda x: x.cumsum(1),
    "diff": lambda x: F.pad(x.diff(dim=1), (0, 1)),
    "lerp": lambda x: torch.lerp(x, 2 * x, 0.3),
    "transposed twice": lambda x: x.t().t(),
    "copy_": lambda x: torch.empty_like(x).copy_(x),
    "unfold": lambda x: x.unfold(1, 5, 1)[:, 0],
    "a constant matrix": lambda x: x @ torch.eye(5, dtype=x.dtype).flip(0),
    "constants computed": lambda x: x * torch.linspace(0, 1, 5, dtype=x.dtype).sqrt() / torch.tensor(3.0).exp(),
    "a question about the values": lambda x: x if not bool(torch.isnan(x).any()) else 0 * x,
}


@pytest.mark.parametrize("between", AFFINE.values(), ids=AFFINE)
def test_what_is_affine_is_allowed_however_it_is_written(between):
    net, u = mlp_with(lambda self, u: self.c(F.relu(self.b(between(F.relu(self.a(u))))))), example()
    teacher = Teacher(net, u)
    U, Z, X, Y = teacher.record(u)
    m = teacher.matrices()
    torch.testing.assert_close(X @ m.A.T + U @ m.B.T + m.b, Z, **ROUNDING)
    torch.testing.assert_close(X @ m.C.T + U @ m.D.T + m.d, Y, **ROUNDING)
    torch.testing.assert_close(Y, net(u).detach(), **ROUNDING)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_weights_may_be_computed_in_any_way(norm):
    net = mlp_with(lambda self, u: self.c(F.relu(F.linear(F.relu(self.a(u)), self.b.weight.abs().clamp(0, 1)))))
    norm(net.a)
    net.eval()
    weight = net.a.weight.detach().clone()
    m = Teacher(net, example()).matrices()
    torch.testing.assert_close(m.B[5:], weight, **ROUNDING)
    torch.testing.assert_close(m.A[:5, 5:], net.b.weight.detach().abs().clamp(0, 1), **ROUNDING)


# --- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, BFLOAT16), (torch.float16, HALF)]
)
@pytest.mark.parametrize("name", ["sequential", "residual"])
def test_a_teacher_of_less_precision_is_recorded_in_its_own_dtype(dtype, tolerance, name):
    known = next(k for k in KNOWN if k.name == name)
    net, u = copy.deepcopy(known.net).to(dtype), known.u.to(dtype)
    recording = Teacher(net, u).record(u)
    assert {part.dtype for part in recording} == {dtype}
    torch.testing.assert_close(recording.Y, net(u).detach(), rtol=0, atol=0)
    for value, true in zip(recording, known.recorded(), strict=True):
        torch.testing.assert_close(value.double(), true, rtol=tolerance, atol=tolerance)
    truth = Teacher(known.net, known.u).matrices()
    for value, true in zip(Teacher(net, u).matrices(), truth, strict=True):
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, true, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 1, 255], ids=["tiny inputs", "inputs of size one", "pixels up to 255"])
def test_rounding_in_a_wide_teacher_is_not_taken_for_something_else(dtype, size):
    for seed in range(3):
        torch.manual_seed(seed)
        layers = (nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10))
        teacher = Teacher(nn.Sequential(*layers).to(dtype), (size * torch.rand(8, 64)).to(dtype))
        assert [layer.units for layer in teacher.layers] == [400, 400]
