import pytest
import torch

from idl import ImplicitModel
from idl.training import ExplicitMLP


def shapes(model):
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("rank", [None, 2])
def test_the_baseline_has_the_matrices_of_the_implicit_model(rank):
    implicit = ImplicitModel(hidden_dim=7, input_dim=5, output_dim=3, low_rank=rank is not None, rank=rank)
    assert shapes(ExplicitMLP(input_dim=5, hidden_dim=7, output_dim=3, rank=rank)) == shapes(implicit)


def test_the_output_is_the_formula():
    torch.manual_seed(0)
    model, u = ExplicitMLP(5, 7, 3).double(), torch.randn(4, 5, dtype=torch.float64)
    for row, output in zip(u, model(u), strict=True):
        hidden = torch.relu(model.A @ torch.relu(model.B @ row))
        torch.testing.assert_close(output, model.C @ hidden + model.D @ row)


def test_a_low_rank_baseline_is_the_full_one_with_the_product_of_the_factors():
    torch.manual_seed(0)
    low, full, u = (
        ExplicitMLP(5, 7, 3, rank=2).double(),
        ExplicitMLP(5, 7, 3).double(),
        torch.randn(4, 5).double(),
    )
    full.load_state_dict({"A": low.L @ low.R.T, **{name: getattr(low, name) for name in "BCD"}})
    torch.testing.assert_close(low(u), full(u))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((0, 7, 3, None), "`input_dim` must be an integer >= 1"), ((5, 7, 3, 8), r"`rank` must be in 1\.\.7")],
)
def test_sizes_out_of_range_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        ExplicitMLP(*sizes)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("size", [2.0, True, "2"])
@pytest.mark.parametrize("name", ["input_dim", "hidden_dim", "output_dim", "rank"])
def test_sizes_that_are_no_integers_are_refused(name, size):
    sizes = {"input_dim": 5, "hidden_dim": 7, "output_dim": 3, "rank": 1, name: size}
    with pytest.raises(TypeError, match=f"`{name}` must be an integer >= 1"):
        ExplicitMLP(**sizes)
