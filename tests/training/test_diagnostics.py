import pytest
import torch

from idl import ImplicitModel
from idl.training import picard_residuals, report_equilibrium


def test_residuals_of_a_linear_map_shrink_by_its_factor():
    residuals = picard_residuals(lambda x: 0.5 * x + 1, torch.zeros(3, 2, dtype=torch.float64), tol=1e-6, max_steps=99)
    expected = 0.5 ** torch.arange(21, dtype=torch.float64)  # 2**-20 is the first below 1e-6
    torch.testing.assert_close(residuals, expected.unsqueeze(1).expand(21, 3))


def test_the_iteration_ends_after_max_steps():
    assert picard_residuals(lambda x: x + 1, torch.zeros(2, 2), tol=1e-6, max_steps=7).shape == (7, 2)


def test_the_report_is_what_the_model_says():
    torch.manual_seed(0)
    model = ImplicitModel(hidden_dim=8, input_dim=5, output_dim=3)
    u = torch.randn(20, 5)
    report = report_equilibrium(model, u)
    A, x = model.state_matrix(), model(u, return_solution=True)[1].x
    assert report.norm == A.abs().sum(1).max().item() < 1
    assert report.converged == 1.0
    residual = (torch.relu(x @ A.T + u @ model.B.T) - x).abs().max().item()
    assert residual <= 1e-5 and report.residual_max <= 1e-5
    assert 1 <= report.steps_median <= report.steps_max


@pytest.mark.usefixtures("as_users_run_it")
def test_what_has_no_equilibrium_to_report_is_refused():
    with pytest.raises(TypeError, match="`model` must be an instance of ImplicitModel; got Linear"):
        report_equilibrium(torch.nn.Linear(5, 3), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"`inputs` must have at least one input; got shape \(0, 5\)"):
        report_equilibrium(ImplicitModel(hidden_dim=8, input_dim=5, output_dim=3), torch.zeros(0, 5))


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "`max_steps` must be an integer >= 1"),
        ({"tol": float("nan")}, "`tol` must be finite"),
        ({"x0": torch.zeros(3)}, "`x0` must have shape"),
        ({"x0": torch.zeros(0, 3)}, "`x0` must have shape"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_iteration_without_steps_samples_or_end_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        picard_residuals(lambda x: x, **{"x0": torch.zeros(2, 3), "tol": 1e-6, "max_steps": 3, **options})
