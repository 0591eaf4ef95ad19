import pytest
import torch

from idl.training import OneCycle


@pytest.mark.parametrize("total_steps", [2, 3, 7, 100])
def test_learning_rate_and_momentum_are_those_of_torch(total_steps):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter])
    oracle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=total_steps)
    schedule = OneCycle(total_steps, 5e-3)
    for step in range(total_steps):
        group = optimizer.param_groups[0]
        assert schedule.learning_rate(step) == pytest.approx(group["lr"], rel=1e-12)
        assert schedule.momentum(step) == pytest.approx(group["betas"][0], rel=1e-12)
        optimizer.step()
        if step + 1 < total_steps:
            oracle.step()


def test_a_schedule_of_one_step_has_a_value():
    assert OneCycle(1, 5e-3).learning_rate(0) > 0


def test_a_step_outside_of_the_schedule_is_refused():
    with pytest.raises(ValueError, match=r"`step` must be in 0\.\.9"):
        OneCycle(10, 5e-3).learning_rate(10)


@pytest.mark.parametrize(
    ("total_steps", "max_learning_rate"), [(0, 1e-3), (10, 0.0), (10, float("nan")), (10, float("inf"))]
)
def test_a_schedule_out_of_range_is_refused(total_steps, max_learning_rate):
    with pytest.raises(ValueError, match="must be"):
        OneCycle(total_steps, max_learning_rate)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(("total_steps", "max_learning_rate"), [(2.5, 1e-3), (True, 1e-3), (10, True), (10, "1e-3")])
def test_a_schedule_of_another_type_is_refused(total_steps, max_learning_rate):
    with pytest.raises(TypeError, match=r"`(total_steps|max_learning_rate)` must be"):
        OneCycle(total_steps, max_learning_rate)
