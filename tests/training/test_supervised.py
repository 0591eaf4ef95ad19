import itertools
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from idl.training import CheckpointError, ExplicitMLP, Labelled, Recipe, evaluate, fit_supervised
from idl.training.checkpoint import load_checkpoint

RECIPE = Recipe(epochs=3, batch_size=16, max_learning_rate=1e-2, seed=0)
STEPS_PER_EPOCH = 4  # 50 samples in batches of 16, the last one smaller


def data(samples=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(samples, 6, generator=generator)
    return Labelled(inputs, (inputs[:, 0] > inputs[:, 1]).long())


def model(seed=0):
    torch.manual_seed(seed)
    # Dropout draws from the global random state, so a resumed run must restore that too.
    return torch.nn.Sequential(
        ExplicitMLP(6, 8, 8), torch.nn.Dropout(0.2), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2)
    )


def stop_after(steps):
    counter = itertools.count(1)
    return lambda: next(counter) == steps


def fit(network, checkpoint=None, recipe=RECIPE, **options):
    return fit_supervised(network, data(), data(30, seed=1), recipe, checkpoint=checkpoint, **options)


def everything_in(checkpoint, recipe=RECIPE):
    """Return weights, optimizer state, position and the next random numbers of a run."""
    network = model(seed=9)
    optimizer = torch.optim.Adam(network.parameters())
    settings = {"epochs": recipe.epochs, "batch_size": 16, "max_learning_rate": 1e-2, "seed": 0}
    position = load_checkpoint(checkpoint, model=network, optimizer=optimizer, settings=settings)
    del position["seconds"]
    return network.state_dict(), optimizer.state_dict(), position, torch.rand(3)


def assert_bitwise_equal(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize("steps", [1, 3, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 2], ids="stopped_after_{}".format)
def test_a_resumed_run_is_bitwise_an_uninterrupted_one(tmp_path, steps):
    whole = fit(model(), tmp_path / "whole.safetensors")
    with pytest.raises(KeyboardInterrupt):
        fit(model(), tmp_path / "parts.safetensors", should_stop=stop_after(steps))
    torch.manual_seed(123)  # whatever happened in between
    parts = fit(model(seed=5), tmp_path / "parts.safetensors")
    assert parts.epochs == whole.epochs
    for left, right in zip(
        everything_in(tmp_path / "parts.safetensors"),
        everything_in(tmp_path / "whole.safetensors"),
        strict=True,
    ):
        assert_bitwise_equal(left, right)


def test_a_run_stopped_after_every_step_ends_at_the_same_history(tmp_path):
    recipe = replace(RECIPE, epochs=2)
    whole = fit(model(), recipe=recipe)
    for _ in range(2 * STEPS_PER_EPOCH - 1):
        with pytest.raises(KeyboardInterrupt):
            fit(model(), tmp_path / "parts.safetensors", recipe, should_stop=lambda: True)
    assert fit(model(), tmp_path / "parts.safetensors", recipe, should_stop=lambda: True).epochs == whole.epochs


def test_a_finished_run_gives_its_history_without_training(tmp_path):
    def never(progress):
        raise AssertionError

    whole = fit(model(), tmp_path / "checkpoint.safetensors")
    assert fit(model(), tmp_path / "checkpoint.safetensors", on_progress=never) == whole


def test_the_order_of_samples_is_the_seeds_and_not_the_random_states(tmp_path):
    network, other, third = (ExplicitMLP(6, 8, 2) for _ in range(3))
    for copy in (other, third):
        copy.load_state_dict(network.state_dict())
    first = fit(network)
    torch.manual_seed(77)
    assert fit(other).epochs == first.epochs
    assert fit(third, recipe=replace(RECIPE, seed=1)).epochs != first.epochs


def test_training_learns_and_reports_what_evaluation_finds():
    network = ExplicitMLP(6, 8, 2)
    reports = []
    history = fit(network, recipe=replace(RECIPE, epochs=30), on_progress=reports.append)
    assert history.epochs[-1].train_loss < 0.5 * history.epochs[0].train_loss
    assert history.epochs[-1][2:] == evaluate(network, data(30, seed=1))
    assert (reports[-1].step, reports[-1].total_steps, reports[-1].epoch) == (120, 120, 30)
    assert reports[-1][4:] == history.epochs[-1][:2]


def test_evaluation_is_cross_entropy_and_accuracy_in_eval_mode():
    network, test = model(), data(1500)
    loss, accuracy = evaluate(network, test)
    assert network.training
    scores = network.eval()(test.inputs)
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(scores, test.labels).item(), rel=1e-5)
    assert accuracy == (scores.argmax(1) == test.labels).sum().item() / 1500


def test_another_setting_is_refused_by_name_and_changes_nothing(tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    fit(model(), checkpoint, settings={"dataset": "digits"})
    network = model(seed=4)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(CheckpointError, match=r'dataset \("digits" there, "mnist" here\), seed \(0 there, 1 here\)'):
        fit(network, checkpoint, replace(RECIPE, seed=1), settings={"dataset": "mnist"})
    assert_bitwise_equal(dict(network.state_dict()), before)


def test_a_recipe_or_data_out_of_range_is_refused():
    with pytest.raises(ValueError, match="`epochs` must be an integer >= 1"):
        replace(RECIPE, epochs=0)
    with pytest.raises(ValueError, match="`train` needs samples"):
        fit_supervised(model(), data(0), data(), RECIPE)
    with pytest.raises(ValueError, match="`data` needs samples"):
        evaluate(model(), data(0))


# --- numbers instead of classes -------------------------------------------------------------------------------------


def numbers(samples=50, seed=0):
    """Sequences and their sum."""
    inputs = torch.rand(samples, 6, 1, generator=torch.Generator().manual_seed(seed))
    return Labelled(inputs, inputs.sum(1))


def test_numbers_are_learned_by_the_mean_square_of_the_error_and_have_no_accuracy(tmp_path):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 1))
    recipe, test, seen = replace(RECIPE, epochs=60, max_learning_rate=0.3), numbers(30, seed=1), []
    history = fit_supervised(network, numbers(), test, recipe, on_progress=seen.append)
    loss = (network(test.inputs) - test.labels).square().mean().item()
    assert history.epochs[-1].test_loss == pytest.approx(loss, rel=1e-5)
    assert history.epochs[-1].test_loss < 1e-2 < history.epochs[0].test_loss
    assert {(record.train_accuracy, record.test_accuracy) for record in history.epochs} == {(None, None)}
    assert seen[-1].accuracy is None and history.to_json()["test_accuracy"] is None
    with pytest.raises(ValueError, match="only classes have an accuracy"):
        history.test_accuracy  # noqa: B018


def test_learning_numbers_resumes_to_the_same_history(tmp_path):
    def run(path, **options):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 1))
        return fit_supervised(network, numbers(), numbers(30, seed=1), RECIPE, checkpoint=tmp_path / path, **options)

    whole = run("whole.safetensors")
    with pytest.raises(KeyboardInterrupt):
        run("parts.safetensors", should_stop=stop_after(5))
    assert run("parts.safetensors").epochs == whole.epochs


def test_numbers_of_another_shape_are_refused_and_not_broadcast():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"must return numbers of shape \(16, 1\); got \(16, 3\)"):
        fit_supervised(network, numbers(), numbers(30, seed=1), RECIPE)


def test_several_classes_of_a_sample_are_counted_one_by_one():
    class Constant(nn.Module):
        """Says class 1 at every place."""

        def __init__(self):
            super().__init__()
            self.score = nn.Parameter(torch.zeros(()))

        def forward(self, inputs):
            scores = torch.zeros(len(inputs), 3, inputs.shape[1])
            scores[:, 1] = 2
            return scores + self.score

    labels = torch.tensor([[1, 1, 0, 2], [1, 1, 1, 0]])
    data = Labelled(torch.zeros(2, 4), labels)
    loss, accuracy = evaluate(Constant(), data)
    assert accuracy == 5 / 8
    assert loss == pytest.approx(-(5 * 2 / 8) + math.log(2 + math.exp(2)))
    history = fit_supervised(Constant(), data, data, Recipe(1, 2, 1e-3, 0))
    assert history.epochs[-1].train_accuracy == 5 / 8


# --- what is refused before any work --------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("epochs", 2.5, TypeError),
        ("epochs", math.nan, TypeError),
        ("batch_size", True, TypeError),
        ("max_learning_rate", math.inf, ValueError),
        ("max_learning_rate", "1e-3", TypeError),
        ("seed", -1, ValueError),
    ],
)
def test_a_field_of_a_recipe_that_is_no_such_number_is_refused(field, value, error):
    with pytest.raises(error, match=f"`{field}` must be"):
        replace(RECIPE, **{field: value})


@pytest.mark.usefixtures("as_users_run_it")
def test_numbers_of_numpy_become_those_of_json():
    recipe = Recipe(np.int64(3), np.int32(16), np.float32(0.5), np.int64(0))
    assert json.loads(json.dumps(asdict(recipe))) == {
        "epochs": 3,
        "batch_size": 16,
        "max_learning_rate": 0.5,
        "seed": 0,
    }


X, Y = data()
BAD = [
    ({"train": Labelled(X, Y[:20])}, ValueError, "`train` must have a label for each input; got 50 inputs, 20 labels"),
    ({"test": Labelled(X[:20], Y)}, ValueError, "`test` must have a label for each input; got 20 inputs, 50 labels"),
    ({"train": (X, Y)}, TypeError, "`train` must be Labelled(inputs, labels); got a tuple"),
    (
        {"test": torch.utils.data.TensorDataset(X, Y)},
        TypeError,
        "`test` must be Labelled(inputs, labels); got a Tensor",
    ),
    ({"train": Labelled(X.numpy(), Y)}, TypeError, "`train.inputs` must be a torch.Tensor; got a ndarray"),
    ({"train": Labelled(X, Y.tolist())}, TypeError, "`train.labels` must be a torch.Tensor; got a list"),
    ({"train": Labelled(X, Y[0])}, ValueError, "`train.labels` must have one row per sample"),
    ({"train": Labelled(X, Y - 1)}, ValueError, "`train.labels` must be classes from 0; got -1"),
    ({"test": Labelled(X[:, :5], Y)}, ValueError, "`test.inputs` must be of the same shape as `train.inputs`"),
    ({"test": Labelled(X[:, None], Y)}, ValueError, "`test.inputs` must be of the same shape as `train.inputs`"),
    ({"test": Labelled(X, Y[:, None])}, ValueError, "`test.labels` must be of the same shape as `train.labels`"),
    (
        {"test": Labelled(X, Y.float())},
        TypeError,
        "`test.labels` must be integers, as `train.labels` is; got torch.float",
    ),
    ({"test": Labelled(X.double(), Y)}, TypeError, "`test.inputs` must be torch.float32"),
    ({"recipe": asdict(RECIPE)}, TypeError, "`recipe` must be an instance of Recipe"),
    ({"should_stop": False}, TypeError, "`should_stop` must be a function; got False"),
    ({"on_progress": 1}, TypeError, "`on_progress` must be a function; got 1"),
    ({"model": nn.Flatten()}, ValueError, "`model` must have a parameter that can be trained; of 0 none can"),
    ({"model": nn.Linear(6, 2).requires_grad_(False)}, ValueError, "of 2 none can. Try model.requires_grad_()"),
    ({"model": torch.relu}, TypeError, "`model` must be a torch.nn.Module"),
    ({"settings": ["seed"]}, TypeError, "`settings` must be a mapping"),
    ({"settings": {"data": Path("x")}}, TypeError, "`settings` must be JSON values; got 'data'"),
    ({"settings": {"tol": math.inf}}, ValueError, "`settings` must be JSON values; got 'tol': inf"),
    (
        {"checkpoint": "no/such/folder/ck"},
        FileNotFoundError,
        "`checkpoint` must lie in a folder that exists; got no/such",
    ),
]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[f"{next(iter(a))}-{m}" for a, _, m in BAD])
def test_an_argument_that_does_not_fit_is_refused_before_any_work(arguments, error, message):
    def forward(module, inputs):
        raise AssertionError("work")

    network = nn.Linear(6, 2)
    network.register_forward_pre_hook(forward)
    with pytest.raises(error, match=re.escape(message)):
        fit_supervised(**{"model": network, "train": data(), "test": data(), "recipe": RECIPE, **arguments})


def test_sequences_of_another_length_may_be_tested_on():
    class Last(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs[:, -1])

    train, test = (Labelled(torch.zeros(4, length, 3), torch.zeros(4, 1)) for length in (5, 9))
    assert len(fit_supervised(Last(3, 1), train, test, RECIPE).epochs) == 3


# --- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_classes_may_be_integers_of_any_kind(dtype):
    def run(dtype):
        torch.manual_seed(0)
        train, test = (Labelled(X, Y.to(dtype)) for X, Y in (data(), data(30, seed=1)))
        return fit_supervised(ExplicitMLP(6, 8, 2), train, test, RECIPE).epochs

    assert run(dtype) == run(torch.int64)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (Y[:, None], r"`labels` must have shape \(16,\) because .* have \(16, 2\); got \(16, 1\)"),
        (nn.functional.one_hot(Y), r"`labels` must have shape \(16,\) .* labels.argmax\(1\) for one-hot"),
        (Y + 1, r"`labels` must be in 0\.\.1 because `model` returns 2 scores; got 2"),
        (Y.float(), r"`model` must return numbers of shape \(16,\); got \(16, 2\).*labels.long\(\)"),
    ],
    ids=["column", "one-hot", "too large", "float"],
)
def test_labels_that_do_not_fit_the_scores_are_refused_before_the_first_step(labels, message):
    network = nn.Linear(6, 2)
    before = network.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        fit_supervised(network, Labelled(X, labels), Labelled(X, labels), RECIPE)
    assert torch.equal(network.weight, before)


def test_a_class_that_only_the_test_data_have_too_many_of_is_refused_before_the_first_step():
    network = nn.Linear(6, 2)
    before = network.weight.detach().clone()
    with pytest.raises(ValueError, match=r"`labels` must be in 0\.\.1"):
        fit_supervised(network, data(), Labelled(X, Y + 1), RECIPE)
    assert torch.equal(network.weight, before)


@pytest.mark.usefixtures("as_users_run_it")
def test_outputs_that_are_no_scores_are_refused():
    class Two(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs), None

    with pytest.raises(TypeError, match=r"`model\(inputs\)` must be an instance of Tensor"):
        evaluate(Two(6, 2), data())
    with pytest.raises(TypeError, match="`model` must be an instance of Module"):
        evaluate(torch.relu, data())
    with pytest.raises(ValueError, match=r"`model` must return scores of shape \(samples, classes, ...\); got \(50,\)"):
        evaluate(nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), data())


@pytest.mark.parametrize("labels", [Y, Y + 1], ids=["evaluated", "refused"])
def test_evaluation_leaves_each_module_in_its_mode(labels):
    network = model()
    network[2].eval()
    modes = [module.training for module in network.modules()]
    try:
        evaluate(network, Labelled(X, labels))
    except ValueError:
        assert labels.max() == 2
    assert [module.training for module in network.modules()] == modes
