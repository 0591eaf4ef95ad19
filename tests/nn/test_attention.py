"""Implicit attention against a plain iteration of its definition, with nothing eliminated."""

import copy
import inspect
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, jacfwd, jacrev, vmap
from torch.nn import functional as F

from idl import Anderson, ConvergenceError, ConvergenceWarning, IDLAttention, IDLHead, Newton, Picard
from idl.attention.contraction import contraction_bound
from idl.attention.forms import LipschitzAttention, Reach
from problems import random
from tolerances import BFLOAT16, FLOAT32, FLOAT64, relative_error

E, H, T, BATCH = 5, 3, 6, 2
TIGHT = {"tol": 1e-13, "grad_tol": 1e-13}
CASES = {
    "softmax": {"attention_version": "softmax"},
    "lipschitz": {"attention_version": "lipschitz"},
    "softmax, rank 2": {"attention_version": "softmax", "is_low_rank": True, "rank": 2},
    "lipschitz, rank 1": {"attention_version": "lipschitz", "is_low_rank": True, "rank": 1, "bias": True},
    "softmax, both ways": {"attention_version": "softmax", "causal": False, "bias": True},
    "lipschitz, both ways": {"attention_version": "lipschitz", "causal": False},
    "contractive": {"attention_version": "lipschitz", "contractive": True},
    "Picard": {"solver": Picard(1e-13, 0.0, 1000)},
    "Anderson": {"solver": Anderson(1e-13, 0.0, 1000)},
}
over = pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
VERSIONS = pytest.mark.parametrize("version", ["softmax", "lipschitz"])
KINDS = pytest.mark.parametrize("heads", [None, 2], ids=["one head", "two heads"])


def module(options, heads=None, dtype=torch.float64, seed=0, block_size=T, **more):
    """Return a head, or attention of several, whose outputs matter to keys, queries and values."""
    torch.manual_seed(seed)
    settings = {"fixed_point_iter": 1000, **TIGHT, **options, **more}
    if "solver" in settings:
        del settings["tol"]  # it has its own
    if heads is None:
        found = IDLHead(H, E, block_size, **settings)
    else:
        found = IDLAttention(E, heads, block_size, head_size=H, **settings)
    return found.to(dtype)


def tokens(batch=BATCH, time=T, seed=1, dtype=torch.float64):
    return random(batch, time, E, seed=seed).to(dtype)


def close(value, truth, tolerance=FLOAT64):
    torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance)


def attention(version, q, k, v, mask):
    """The two forms as they are defined, token by token."""
    if version == "softmax":
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
        return torch.nan_to_num(scores.softmax(-1)) @ v
    distances = (q[..., :, None, :] - k[..., None, :, :]).square().sum(-1)
    weights = torch.exp(-distances) * mask
    return weights / (0.25 + weights.sum(-1, keepdim=True)) @ (v / (1 + v**2).sqrt())


def by_definition(layer, u, padding=None, steps=2000):
    """Iterate the whole state ``[k q v o]`` of each head, recorded by autograd."""
    size, head = 3 * layer.head_size, layer.head_size
    A = layer.state_matrix().reshape(-1, size, 4 * head)
    if layer.contractive:
        A = scaled_by_hand(layer, A)
    B = layer.B.reshape(len(A), size, -1)
    bias = 0 if layer.bias is None else layer.bias.reshape(len(A), 1, size)
    source = u[:, None] @ B.mT + bias
    time = u.shape[1]
    mask = torch.ones(time, time, dtype=torch.bool)
    mask = mask.tril() if layer.causal else mask
    if padding is not None:
        mask = mask & ~padding[:, None, None, :]
        source = source.masked_fill(padding[:, None, :, None], 0)
    x = torch.zeros(len(u), len(A), time, 4 * head, dtype=u.dtype)
    for _ in range(steps):
        k, q, v = (x @ A.mT + source).chunk(3, -1)
        image = torch.cat((k, q, v, attention(layer.attention_version, q, k, v, mask)), -1)
        if torch.equal(image, x):
            break
        x = image
    o = x[..., size:]
    if isinstance(layer, IDLHead):
        return o[:, 0]
    return layer.projection(o.transpose(1, 2).flatten(2))


def scaled_by_hand(layer, A):
    """Scale the part of A that reads outputs until the bound of the eliminated map is kappa."""
    size = A.shape[1]

    def bound(factor):
        scaled = torch.cat((A[..., :size], factor * A[..., size:]), -1)
        W = torch.linalg.solve(torch.eye(size, dtype=A.dtype) - A[..., :size], scaled[..., size:])
        return bound_by_hand(W, layer.block_size), scaled

    unscaled, _ = bound(1.0)
    return bound((layer.kappa / unscaled.clamp_min(layer.kappa))[:, None, None])[1]


def bound_by_hand(W, keys):
    r = torch.linspace(0, 8, 400001, dtype=torch.float64)
    S = float((keys * r * torch.exp(-(r**2)) / (0.25 + keys * torch.exp(-(r**2)))).max())
    mass, head = keys / (keys + 0.25), W.shape[-1]

    def two_norm(block):
        rows = block.abs().sum(-1).square().sum(-1).sqrt()
        return torch.minimum(rows, math.sqrt(head) * torch.linalg.matrix_norm(block, 2))

    k, q, v = W.chunk(3, -2)
    return mass * v.abs().sum(-1).amax(-1) + 2 * (1 + mass) * S * (two_norm(q) + two_norm(k))


# --- values and gradients -------------------------------------------------------------------------------------------


@KINDS
@over
def test_values_and_gradients_are_those_of_the_definition(options, heads):
    layer, u = module(options, heads), tokens().requires_grad_()
    leaves = [u, *layer.parameters()]
    value, truth = layer(u), by_definition(layer, u)
    close(value, truth, 1e-7 if layer.contractive else FLOAT64)  # the oracle finds S_N on a grid
    weights = random(*value.shape, seed=3)
    ours = torch.autograd.grad((value * weights).sum(), leaves)
    theirs = torch.autograd.grad((truth * weights).sum(), leaves)
    for one, other in zip(ours, theirs, strict=True):
        close(one, other, 1e-6 if layer.contractive else 1e-8)


@KINDS
@over
def test_first_and_second_derivatives_agree_with_finite_differences(options, heads):
    layer = module(options, heads)
    named = dict(layer.named_parameters())

    def function(u, *values):
        return functional_call(layer, dict(zip(named, values, strict=True)), (u,))

    leaves = [t.detach().clone().requires_grad_() for t in (0.5 * tokens(time=4), *named.values())]
    settings = {"eps": 1e-6, "atol": 1e-5, "fast_mode": True}
    assert gradcheck(function, leaves, check_undefined_grad=False, **settings)
    assert gradgradcheck(function, leaves, check_undefined_grad=False, **settings)


@VERSIONS
def test_jacobians_of_both_modes_agree_and_map_over_samples(version):
    layer, u = module({"attention_version": version}), 0.5 * tokens(time=3)
    close(jacfwd(layer)(u), jacrev(layer)(u), 1e-8)
    per_sample = vmap(lambda sample: torch.func.grad(lambda v: layer(v[None]).square().sum())(sample))(u)
    (whole,) = torch.autograd.grad(layer(v := u.clone().requires_grad_()).square().sum(), v)
    close(per_sample, whole, 1e-8)


@VERSIONS
def test_a_gradient_does_not_depend_on_the_scale_of_the_loss(version):
    layer, u = module({"attention_version": version}, 2, torch.float32, tol=3e-6, grad_tol=3e-6), tokens().float()
    whole, tiny = (torch.autograd.grad(s * layer(u).square().sum(), list(layer.parameters())) for s in (1.0, 1e-8))
    for one, other in zip(whole, tiny, strict=True):
        assert relative_error(other.double() * 1e8, one) < 1e-4


@VERSIONS
def test_a_recorded_and_a_truncated_gradient_approach_the_exact_one(version):
    exact, u = module({"attention_version": version}), tokens()
    gradients = {}
    for gradient, steps in (("implicit", 1000), ("unrolled", 60), ("phantom", 1000)):
        layer = module({"attention_version": version}, gradient=gradient, fixed_point_iter=steps)
        layer.load_state_dict(exact.state_dict())
        gradients[gradient] = torch.autograd.grad(layer(u).square().sum(), layer.B)[0]
    assert relative_error(gradients["unrolled"], gradients["implicit"]) < 1e-9
    assert 0 < relative_error(gradients["phantom"], gradients["implicit"]) < 0.1


# --- causality, padding, the past -----------------------------------------------------------------------------------


@over
def test_a_causal_token_does_not_see_later_ones_and_others_do(options):
    layer, u = module(options), tokens()
    later = u.clone()
    later[:, 4:] += 1.0
    same = torch.allclose(layer(later)[:, :4], layer(u)[:, :4], rtol=0, atol=1e-11)
    assert same == layer.causal


@KINDS
@over
def test_padding_is_not_read(options, heads):
    layer, u = module(options, heads), tokens()
    padding = torch.zeros(BATCH, T, dtype=torch.bool)
    padding[1, 4:] = True
    found = layer(u, padding)
    close(found[0], layer(u)[0], 1e-7 if layer.contractive else FLOAT64)
    close(found[1, :4], layer(u[1:, :4])[0], 1e-7 if layer.contractive else FLOAT64)
    for garbage in (1e6, math.nan, math.inf):
        other = u.clone()
        other[1, 4:] = garbage
        assert torch.equal(layer(other, padding), found)
    left = padding.flip(1)
    if not layer.contractive:
        close(layer(u, left), by_definition(layer, u, left))


@VERSIONS
def test_a_token_that_may_read_nothing_gives_zero(version):
    layer, u = module({"attention_version": version}), tokens().requires_grad_()
    padding = torch.ones(BATCH, T, dtype=torch.bool)
    padding[0] = False
    y = layer(u, padding)
    assert bool((y[1] == 0).all())
    (g,) = torch.autograd.grad(y.square().sum(), u)
    assert bool(g.isfinite().all())
    assert bool((g[1] == 0).all())


@KINDS
@pytest.mark.parametrize("name", ["softmax", "lipschitz", "softmax, rank 2", "lipschitz, rank 1", "contractive"])
def test_tokens_one_by_one_with_a_past_give_what_all_give_together(name, heads):
    layer, u = module(CASES[name], heads), tokens()
    whole, past, pieces = layer(u), None, []
    for piece in (u[:, :2], u[:, 2:3], u[:, 3:]):
        y, past = layer(piece, past=past, return_past=True)
        pieces.append(y)
    close(torch.cat(pieces, 1), whole, 1e-10)
    assert past[0].shape == (BATCH, heads or 1, T, H)


# --- one head and several -------------------------------------------------------------------------------------------


@over
def test_several_heads_are_as_many_single_ones(options):
    layer, u = module(options, 2), tokens()
    outputs = []
    for i in range(2):
        head = module(options)
        head.load_state_dict({name: value[i] for name, value in layer.state_dict().items() if "projection" not in name})
        outputs.append(head(u))
    close(layer(u), layer.projection(torch.cat(outputs, -1)))


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_head_starts_exactly_at_an_explicit_one_and_then_learns(bias, low_rank):
    torch.manual_seed(0)
    key, query, value = (nn.Linear(32, 8, bias=bias) for _ in range(3))
    u = torch.randn(2, 16, 32)
    head = IDLHead.from_explicit(key, query, value, is_low_rank=low_rank, rank=2)
    truth = F.scaled_dot_product_attention(query(u), key(u), value(u), is_causal=True)
    torch.testing.assert_close(head(u), truth, rtol=0, atol=1e-6)
    head(u).square().mean().backward()
    assert float((head.L if low_rank else head.A).grad.abs().max()) > 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_starts_exactly_at_an_explicit_one(bias, causal):
    torch.manual_seed(0)
    key, query, value, projection = (nn.Linear(32, 32, bias=bias) for _ in range(4))
    u = torch.randn(2, 16, 32)
    layer = IDLAttention.from_explicit(key, query, value, projection, n_head=4, causal=causal)
    q, k, v = (linear(u).unflatten(-1, (4, 8)).transpose(1, 2) for linear in (query, key, value))
    truth = projection(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(u), truth, rtol=0, atol=1e-6)


# --- the certificate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.02, 0.1, 0.5, 3.0])
def test_no_search_finds_two_states_that_come_less_close_than_the_bound_says(scale):
    form, reach, keys = LipschitzAttention(), Reach(False), 5
    for seed in range(6):
        W = scale * random(3 * H, H, seed=seed)
        bound = float(contraction_bound(W[None], keys))
        torch.manual_seed(seed)
        source = (2.0 * torch.randn(16, 1, keys, 3 * H, dtype=torch.float64)).requires_grad_()
        o = torch.randn(16, 1, keys, H, dtype=torch.float64).requires_grad_()
        direction = torch.randn(16, 1, keys, H, dtype=torch.float64).sign()

        def image(o, source=source, W=W):
            k, q, v = (source + o @ W.mT).chunk(3, -1)
            return form.formula(q, k, v, reach, None)

        optimizer = torch.optim.Adam([source, o], lr=0.1)
        worst = 0.0
        for _ in range(60):  # ascend the change of the image along a change of norm 1
            optimizer.zero_grad()
            _, moved = torch.func.jvp(image, (o,), (direction,))
            sizes = moved.abs().flatten(1).amax(1)
            worst = max(worst, float(sizes.detach().max()))
            (-sizes.sum()).backward()
            optimizer.step()
            with torch.no_grad():  # the worst direction for the entry that moves most
                place = moved.abs().flatten(1).argmax(1)
                row = torch.func.vjp(image, o)[1](F.one_hot(place, keys * H).to(o).view_as(o))[0]
                direction = row.sign()
        assert worst <= bound
        assert worst > 0.02 * bound


@KINDS
def test_a_contractive_layer_contracts_as_it_says(heads):
    layer = module(CASES["contractive"], heads)
    assert layer.contraction_bound() <= layer.kappa * (1 + 1e-9)
    assert layer.contraction_bound(1) < layer.contraction_bound()
    free = module(CASES["lipschitz"], heads)
    assert free.contraction_bound() > layer.contraction_bound()
    assert module(CASES["softmax"], heads).contraction_bound() is None
    u = tokens()
    _, loose = module(CASES["contractive"], heads, tol=1e-3)(u, return_solution=True)
    _, exact = layer(u, return_solution=True)
    error = (loose.x - exact.x).abs().flatten(1).amax(1)
    assert bool((error <= loose.error_bound).all())
    assert float(loose.error_bound.max()) < 0.1


# --- what a call reports --------------------------------------------------------------------------------------------


@KINDS
@VERSIONS
def test_a_call_says_how_exact_it_is(version, heads):
    layer, u = module({"attention_version": version}, heads, tol=1e-8), tokens()
    y, solution = layer(u, return_solution=True)
    assert solution.x.shape == (BATCH, heads or 1, T, H)
    assert solution.residual.shape == solution.steps.shape == solution.converged.shape == (BATCH,)
    assert bool(solution.converged.all())
    assert 0 < float(solution.residual.max()) < 1e-7
    assert 1 < int(solution.steps.max()) < 1000
    if heads is None:
        assert torch.equal(solution.x[:, 0], y)


def test_too_few_steps_are_reported_as_the_policy_says():
    u = tokens()
    for policy, expected in (("warn", ConvergenceWarning), ("raise", ConvergenceError)):
        layer = module({}, fixed_point_iter=2, on_failure=policy)
        with pytest.raises(ConvergenceError) if policy == "raise" else pytest.warns(expected) as caught:
            layer(u)
        if policy == "warn":
            assert len(caught) == 1
            assert "fixed_point_iter" in str(caught[0].message)
    layer = module({}, fixed_point_iter=2, on_failure="ignore")
    y, solution = layer(u, return_solution=True)
    assert bool(y.isfinite().all())
    assert not bool(solution.converged.any())
    assert int(solution.steps.max()) <= 3


@KINDS
@VERSIONS
def test_a_sequence_that_is_not_finite_does_not_touch_the_others(version, heads):
    layer, u = module({"attention_version": version}, heads, torch.float32, tol=1e-6, grad_tol=1e-6), tokens(3).float()
    expected = layer(u)
    u[1, 2, 0] = math.nan
    with pytest.warns(ConvergenceWarning) as caught:
        y, solution = layer(u, return_solution=True)
    assert len(caught) == 1
    torch.testing.assert_close(y[[0, 2]], expected[[0, 2]], rtol=0, atol=FLOAT32)
    assert bool(y[1].isnan().any())
    assert solution.converged.tolist() == [True, False, True]


# --- under everything that torch does to a module -------------------------------------------------------------------


@KINDS
@over
def test_copies_pickles_saved_states_and_modes_give_the_same(options, heads):
    layer, u = module(options, heads), tokens()
    expected = layer(u)
    fresh = module(options, heads, seed=9)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh, layer.eval()):
        close(twin(u), expected)
    with torch.no_grad():
        close(layer(u), expected)


@KINDS
@VERSIONS
def test_a_layer_moves_to_bfloat16_and_runs_under_autocast(version, heads):
    layer = module({"attention_version": version}, heads, torch.float32, tol=3e-6, grad_tol=3e-6)
    u = tokens().float()
    truth = layer(u)
    low = copy.deepcopy(layer).bfloat16()(u.bfloat16())
    assert low.dtype == torch.bfloat16
    assert relative_error(low.float(), truth) < BFLOAT16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(u)
    assert relative_error(y.float(), truth) < BFLOAT16
    y.float().square().sum().backward()
    assert all(p.grad.dtype == p.dtype for p in layer.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's tracer, of a view's base
@pytest.mark.usefixtures("as_users_run_it")
@VERSIONS
def test_a_compiled_layer_gives_the_same(version):
    layer, u = module({"attention_version": version}, 2), tokens()
    compiled = torch.compile(layer, backend="eager")
    close(compiled(u), layer(u))


def test_memory_does_not_grow_with_the_number_of_steps():
    def kept(version, steps, **options):
        layer = module({"attention_version": version}, fixed_point_iter=steps, on_failure="ignore", tol=0.0, **options)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            layer(tokens())
        return sum(sizes)

    for version in ("softmax", "lipschitz"):
        assert kept(version, 5) == kept(version, 50)
        assert kept(version, 50, gradient="unrolled") > 5 * kept(version, 5, gradient="unrolled")


@VERSIONS
def test_dropout_draws_once_a_call_and_only_in_training(version):
    layer, u = module({"attention_version": version}, dropout=0.5), tokens()
    close(layer.eval()(u), module({"attention_version": version})(u))
    layer.train()
    torch.manual_seed(1)
    y, solution = layer(u, return_solution=True)
    assert bool(solution.converged.all())  # no equilibrium could be found if each step drew anew
    assert float(solution.residual.max()) < 1e-11
    assert not torch.equal(y, layer(u))
    torch.manual_seed(1)
    close(layer(u), y)
    assert bool((module({"attention_version": version}, dropout=1.0)(u) == 0).all())


def test_two_layers_with_different_options_do_not_touch_each_other():
    one, other = module({}, kappa=0.5), module({}, kappa=0.9)
    before = one(tokens())
    other(tokens())
    assert torch.equal(one(tokens()), before)
    assert float(one.state_matrix().detach().abs().sum(-1).max()) <= 0.5
    assert 0.5 < float(other.state_matrix().detach().abs().sum(-1).max()) <= 0.9


# --- the call and its errors ----------------------------------------------------------------------------------------


def test_the_signature_is_the_promised_one():
    parameters = inspect.signature(IDLHead).parameters
    positional = [n for n, p in parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert positional == "head_size n_embd block_size fixed_point_iter attention_version is_low_rank rank".split()
    assert (parameters["is_low_rank"].default, parameters["rank"].default) == (False, 1)


@VERSIONS
@pytest.mark.parametrize("low_rank", [False, True])
def test_the_call_of_the_specification_converges_within_few_steps(version, low_rank):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert IDLHead(8, 32, 16, 30, version, low_rank, 2)(torch.randn(2, 16, 32)).shape == (2, 16, 8)


CONSTRUCTIONS = [
    ({"attention_version": "linear"}, ValueError, ["`attention_version`", "'softmax', 'lipschitz'", "'linear'"]),
    ({"is_low_rank": True, "rank": 10}, ValueError, ["`rank`", "at most 3 * head_size=9", "got 10"]),
    ({"is_low_rank": True, "rank": 0}, ValueError, ["`rank`", "got 0"]),
    ({"rank": "abc"}, TypeError, ["`rank`", "'abc'"]),
    ({"bias": "False"}, TypeError, ["`bias`", "True or False", "'False'"]),
    ({"is_low_rank": 1}, TypeError, ["`is_low_rank`", "got 1"]),
    ({"fixed_point_iter": 0}, ValueError, ["`fixed_point_iter`", "got 0"]),
    ({"kappa": 1.0}, ValueError, ["`kappa`", "1.0"]),
    ({"dropout": 1.5}, ValueError, ["`dropout`", "1.5"]),
    ({"gradient": "exact"}, ValueError, ["`gradient`", "'implicit', 'unrolled', 'phantom'", "'exact'"]),
    ({"contractive": True}, ValueError, ["`contractive`", "lipschitz", "softmax"]),
    ({"solver": "anderson"}, TypeError, ["`solver`", "'anderson'"]),
    ({"on_failure": "stop"}, ValueError, ["`on_failure`", "'stop'"]),
    ({"causal": None}, TypeError, ["`causal`", "None"]),
    ({"block_size": 0}, ValueError, ["`block_size`", "got 0"]),
    ({"tol": -1.0}, ValueError, ["`tol`", "-1.0"]),
]


@pytest.mark.usefixtures("as_users_run_it")
@KINDS
@pytest.mark.parametrize(("options", "kind", "words"), CONSTRUCTIONS, ids=[str(row[0]) for row in CONSTRUCTIONS])
def test_a_setting_that_does_not_fit_is_named(options, kind, words, heads):
    with pytest.raises(kind) as caught:
        module({}, heads, **options)
    assert [w for w in words if w not in str(caught.value)] == [], str(caught.value)


@pytest.mark.usefixtures("as_users_run_it")
def test_heads_must_divide_the_embedding():
    with pytest.raises(ValueError, match=r"n_head.*divide n_embd=5"):
        IDLAttention(5, 2, 8)
    with pytest.raises(ValueError, match="one shape"):
        IDLHead.from_explicit(nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(5, 4))
    with pytest.raises(TypeError, match=r"`options` must be of .*; got head_size, widht"):
        IDLHead.from_explicit(*(nn.Linear(4, 2) for _ in range(3)), head_size=3, widht=2)
    with pytest.raises(TypeError, match=r"`query` has dtype torch.float64 but `key` has torch.float32"):
        IDLHead.from_explicit(nn.Linear(4, 2), nn.Linear(4, 2).double(), nn.Linear(4, 2))
    with pytest.raises(TypeError, match="`query`"):
        IDLHead.from_explicit(nn.Linear(5, 3), None, nn.Linear(5, 3))
    with pytest.raises(ValueError, match="projection"):
        IDLAttention.from_explicit(*(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 5), n_head=2)


U = torch.ones(BATCH, T, E, dtype=torch.float64)
PAST = (torch.ones(BATCH, 1, 2, H, dtype=torch.float64),) * 2
CALLS = [
    ("too many tokens", (torch.ones(1, 7, E, dtype=torch.float64),), {}, ValueError, ["block_size=6", "got 7"]),
    ("too many with the past", (U,), {"past": PAST}, ValueError, ["block_size=6", "got 8"]),
    ("another width", (U[..., :4],), {}, ValueError, ["`u`", "(batch, time, 5)", "(2, 6, 4)"]),
    ("no time", (U[:, :0],), {}, ValueError, ["`u`", "at least one time", "(2, 0, 5)"]),
    ("two dimensions", (U[0],), {}, ValueError, ["`u`", "(6, 5)"]),
    ("integers", (U.long(),), {}, TypeError, ["`u`", "int64"]),
    ("float32", (U.float(),), {}, TypeError, ["float32", "float64"]),
    (
        "a mask of another shape",
        (U, torch.zeros(2, 5).bool()),
        {},
        ValueError,
        ["`key_padding_mask`", "(2, 6)", "(2, 5)"],
    ),
    ("a mask of numbers", (U, torch.zeros(2, 6)), {}, ValueError, ["`key_padding_mask`", "bool", "float32"]),
    ("a mask that is a list", (U, [[False] * 6] * 2), {}, TypeError, ["`key_padding_mask`", "Tensor"]),
    ("a flag that is none", (U,), {"return_solution": "no"}, TypeError, ["`return_solution`", "'no'"]),
    ("a past of three", (U[:, :1],), {"past": (*PAST, PAST[0])}, TypeError, ["`past`", "two tensors", "3 of them"]),
    ("a past of lists", (U[:, :1],), {"past": ([1.0], [2.0])}, TypeError, ["`past`", "torch.Tensor", "list"]),
    ("a past that is a solution", (U[:, :1],), {"past": object()}, TypeError, ["`past`", "two tensors", "object"]),
    ("a past of another batch", (U[:1, :1],), {"past": PAST}, ValueError, ["`past`", "(1, 1, 2, 3)", "(2, 1, 2, 3)"]),
]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(("arguments", "keywords", "kind", "words"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_what_does_not_fit_is_named(arguments, keywords, kind, words):
    with pytest.raises(kind) as caught:
        module({})(*arguments, **keywords)
    assert [w for w in words if w not in str(caught.value)] == [], str(caught.value)


def test_a_past_needs_causality():
    with pytest.raises(ValueError, match="causal=False"):
        module({}, causal=False)(U[:, :1], past=PAST)


def test_an_empty_batch_gives_an_empty_result():
    for heads in (None, 2):
        assert len(module({}, heads)(U[:0])) == 0


def test_repr_says_what_the_layer_is():
    text = repr(module(CASES["lipschitz, rank 1"]))
    assert "IDLHead(3, 5, block_size=6, lipschitz, rank=1, kappa=0.95, causal=True, gradient=implicit" in text


@VERSIONS
def test_newton_finds_the_equilibrium_of_the_default(version):
    u = tokens()
    found = module({"attention_version": version, "solver": Newton(1e-12)})(u)
    close(found, module({"attention_version": version})(u), 1e-9)


def test_dropout_is_part_of_the_bound():
    # One token that reads only itself: weights of .8 become 1.6, and the map has several fixed points.
    head = IDLHead(4, E, 1, 500, "lipschitz", dropout=0.5, on_failure="ignore", tol=1e-12).double()
    with torch.no_grad():
        head.A.zero_()
        head.A[8:, 12:] = 0.95 * torch.eye(4)
        head.B.mul_(1e-3)
    quiet = head.eval().contraction_bound()
    assert head.train().contraction_bound() == pytest.approx(2 * quiet) and 2 * quiet > 1
    assert head(tokens(time=1), return_solution=True)[1].error_bound is None
    tame = IDLHead(4, E, 1, 500, "lipschitz", dropout=0.5, contractive=True, tol=1e-12).double()
    tame.load_state_dict(head.state_dict())
    assert tame.train().contraction_bound() <= tame.kappa * (1 + 1e-12)
    assert tame.eval().contraction_bound() == pytest.approx(tame.train().contraction_bound() / 2)
    u = tokens(batch=8, time=1)
    torch.manual_seed(1)
    rough, solution = IDLHead.forward(tame, u, return_solution=True)
    tame.solver = Picard(1e-14, 0.0, 3000)
    torch.manual_seed(1)
    assert bool(((tame(u) - rough).abs().flatten(1).amax(1) <= solution.error_bound + 1e-13).all())


@pytest.mark.parametrize("low_rank", [False, True])
def test_a_contractive_head_that_starts_as_an_explicit_one_has_second_derivatives(low_rank):
    head = module({**CASES["contractive"], "is_low_rank": low_rank, "rank": 2})
    with torch.no_grad():
        (head.L if low_rank else head.A).zero_()
    parameters = [p.requires_grad_() for p in head.parameters()]
    grads = torch.autograd.grad(head(tokens()).square().sum(), parameters, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), parameters, allow_unused=True)
    assert all(bool(g.isfinite().all()) for g in second if g is not None)


@VERSIONS
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_stands_in_padding_reaches_no_gradient(version, value):
    head, u = module({"attention_version": version, "bias": True}), tokens()
    padding = torch.zeros(BATCH, T, dtype=torch.bool)
    padding[0, 0] = True
    clean = torch.autograd.grad(head(u, padding).square().sum(), list(head.parameters()))
    u[0, 0] = value
    for found, expected in zip(
        torch.autograd.grad(head(u, padding).square().sum(), list(head.parameters())), clean, strict=True
    ):
        close(found, expected)


@pytest.mark.parametrize(
    "make", [lambda **o: IDLHead(4, E, 6, 50, "softmax", **o), lambda **o: IDLAttention(12, 3, 6, **o)]
)
def test_a_tolerance_is_refused_beside_a_solver_that_has_its_own(make):
    with pytest.raises(ValueError, match=r"`tol` must not be given beside solver=Picard\("):
        make(solver=Picard(), tol=1e-9)
    assert make(solver=Picard(atol=1e-9)).solver == Picard(atol=1e-9)
