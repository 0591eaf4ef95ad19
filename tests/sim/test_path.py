"""A path of models can be interrupted anywhere and resumed to the same numbers."""

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from idl import SIM
from idl.sim import lambda_path
from idl.sim.solvers import ADMM, Cardinality, CoordinateDescent, Hybrid

LAMS = (1e-1, 1e-2, 1e-3)


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.fixture
def batches():
    return torch.randn(120, 6, generator=torch.Generator().manual_seed(1)).split(50)


def same(one, other):
    """Whether two fits are the same in every number."""
    first, second = one.certificate_, other.certificate_
    for a, b in zip(one.model_.state_dict().items(), other.model_.state_dict().items(), strict=True):
        assert a[0] == b[0] and torch.equal(a[1], b[1])
    for part in ("states", "outputs"):
        rows, again = getattr(first, part), getattr(second, part)
        assert torch.equal(rows.W, again.W) and torch.equal(rows.gap, again.gap) and rows.steps == again.steps
        assert (rows.support_gap is None) == (again.support_gap is None)
    assert str(first) == str(second)
    assert first.weights_kept == second.weights_kept and first.uncertified == second.uncertified
    return one.lam == other.lam


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"l1_ratio": 0.7, "rescale": "layerwise"},
        {"refit": "layers", "solver": ADMM()},
        {"refit": False, "debias": False, "knee": 0.2},
        {"solver": Cardinality(keep=0.3)},
    ],
    ids=repr,
)
@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_a_path_resumes_to_the_numbers_of_one_that_was_not_interrupted(settings, done, teacher, batches, tmp_path):
    whole = list(lambda_path(teacher, batches, LAMS, **settings))
    path = lambda_path(teacher, batches, LAMS, folder=tmp_path / "path", **settings)
    for _ in range(done):
        next(path)
    path.close()
    assert len(list((tmp_path / "path").glob("*"))) == done if done else True
    resumed = list(lambda_path(teacher, batches, LAMS, folder=tmp_path / "path", **settings))
    assert all(same(one, other) for one, other in zip(resumed, whole, strict=True))
    again = list(lambda_path(teacher, batches, LAMS, folder=tmp_path / "path", **settings))
    assert all(same(one, other) for one, other in zip(again, whole, strict=True))


class Interrupted(Exception):
    """Something that stops a fit."""


def test_a_fit_that_is_interrupted_leaves_the_ones_before_it(teacher, batches, tmp_path, monkeypatch):
    whole = list(lambda_path(teacher, batches, LAMS))
    solve, calls = Hybrid.solve, []

    def stops(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise Interrupted
        return solve(self, *arguments)

    monkeypatch.setattr(Hybrid, "solve", stops)
    with pytest.raises(Interrupted):
        list(lambda_path(teacher, batches, LAMS, folder=tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["lam-0.1.safetensors"]
    monkeypatch.undo()
    resumed = list(lambda_path(teacher, batches, LAMS, folder=tmp_path))
    assert all(same(one, other) for one, other in zip(resumed, whole, strict=True))


def test_what_is_there_is_not_fitted_again(teacher, batches, tmp_path, monkeypatch):
    list(lambda_path(teacher, batches, LAMS, folder=tmp_path))
    monkeypatch.setattr(Hybrid, "solve", lambda *_: pytest.fail("it was fitted again"))
    assert len(list(lambda_path(teacher, batches, LAMS, folder=tmp_path))) == 3


def test_a_path_can_be_refined_later(teacher, batches, tmp_path):
    list(lambda_path(teacher, batches, LAMS[:1], folder=tmp_path))
    finer = list(lambda_path(teacher, batches, LAMS, folder=tmp_path))
    assert [sim.lam for sim in finer] == list(LAMS)


@pytest.mark.parametrize(
    "settings",
    [{"kappa": 0.9}, {"solver": CoordinateDescent()}, {"knee": 1.0}, {"column_weights": [2.0] * 19}, {"layers": ["1"]}],
    ids=repr,
)
def test_a_folder_of_other_settings_is_refused(settings, teacher, batches, tmp_path):
    list(lambda_path(teacher, batches, LAMS[:1], folder=tmp_path))
    with pytest.raises(ValueError, match=r"lam-0.1.safetensors is of other"):
        list(lambda_path(teacher, batches, LAMS, folder=tmp_path, **settings))


def test_a_folder_of_other_data_or_another_teacher_is_refused(teacher, batches, tmp_path):
    list(lambda_path(teacher, batches, LAMS[:1], folder=tmp_path))
    for other in (batches[:1], (1.001 * batches[0], *batches[1:])):
        with pytest.raises(ValueError, match=r"lam-0.1.safetensors is of other data"):
            list(lambda_path(teacher, other, LAMS, folder=tmp_path))
    with torch.no_grad():
        teacher[0].weight[0, 0] += 0.01
    with pytest.raises(ValueError, match="other data, or of another teacher"):
        list(lambda_path(teacher, batches, LAMS, folder=tmp_path))


def test_the_order_of_the_batches_does_not_matter(teacher, batches, tmp_path):
    list(lambda_path(teacher, batches, LAMS[:1], folder=tmp_path))
    assert len(list(lambda_path(teacher, batches[::-1], LAMS[:1], folder=tmp_path))) == 1


def test_files_that_are_damaged_or_foreign_are_refused_by_name(teacher, batches, tmp_path):
    list(lambda_path(teacher, batches, LAMS[:1], folder=tmp_path))
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"lam-0.1.safetensors is damaged"):
        list(lambda_path(teacher, batches, LAMS, folder=tmp_path))
    safetensors.torch.save_file({"A": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"lam-0.1.safetensors is no file of a path"):
        list(lambda_path(teacher, batches, LAMS, folder=tmp_path))


def test_a_resumed_model_trains_further(teacher, batches, tmp_path):
    list(lambda_path(teacher, batches, LAMS, folder=tmp_path))
    *_, sim = lambda_path(teacher, batches, LAMS, folder=tmp_path)
    assert isinstance(sim, SIM)
    sim.model_(batches[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in sim.model_.parameters())
    torch.testing.assert_close(sim.predict(batches[0]), sim.model_(batches[0]).detach(), rtol=1e-5, atol=1e-6)


def test_weights_of_a_penalty_that_are_nearly_the_same_are_two(teacher, batches, tmp_path):
    lams = [1e-2, 1e-2 * (1 + 1e-7)]
    assert len(list(lambda_path(teacher, batches, lams, folder=tmp_path))) == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_is_no_folder(teacher, batches, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`folder` must be a folder"):
        list(lambda_path(teacher, batches, LAMS, folder=tmp_path / "file"))


@pytest.mark.parametrize(
    ("lams", "error", "message"),
    [
        ([1e-2, -1e-3], ValueError, r"`lams\[1\]` must be finite and > 0; got -0.001"),
        ([1e-2, "1e-3"], TypeError, r"`lams\[1\]` must be"),
        ([1e-2, float("nan")], ValueError, r"`lams\[1\]` must be"),
    ],
    ids=repr,
)
def test_a_weight_that_cannot_be_is_named_when_the_path_is_asked_for(lams, error, message, as_users_run_it):
    def untouched():
        raise AssertionError("no sample is read before the path is iterated over")
        yield

    class Untouched:
        __iter__ = untouched

    with pytest.raises(error, match=message):
        lambda_path(nn.Linear(6, 3), Untouched(), lams)
    with pytest.raises(ValueError, match="`kappa` must"):
        lambda_path(nn.Linear(6, 3), Untouched(), LAMS, kappa=2.0)


def test_a_path_of_no_weights_is_empty(teacher, batches):
    assert list(lambda_path(teacher, batches, [])) == []
