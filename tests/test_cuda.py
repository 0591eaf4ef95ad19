"""On a GPU everything is as on the CPU; skipped where there is none."""

import pytest
import torch

from idl import Anderson, ImplicitFunctionInf, ImplicitModel, Newton, fixed_point

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize(
    "options",
    [{}, {"low_rank": True, "rank": 2}, {"f": ImplicitFunctionInf(solver=Newton())}, {"activation": torch.tanh}],
    ids=["full", "low rank", "Newton", "callable"],
)
def test_a_model_gives_on_the_gpu_what_it_gives_on_the_cpu(options):
    torch.manual_seed(0)
    model, u = ImplicitModel(20, 8, 3, **options).double(), torch.rand(16, 8, dtype=torch.float64)
    y = model(u)
    y.square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.cuda()
    moved = model(u.cuda())
    moved.square().sum().backward()
    torch.testing.assert_close(moved.cpu(), y, rtol=1e-4, atol=1e-5)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), gradient, rtol=1e-4, atol=1e-5)


def test_a_model_on_the_gpu_refuses_an_input_on_the_cpu():
    with pytest.raises(ValueError, match=r"is on cuda"):
        ImplicitModel(20, 8, 3).cuda()(torch.rand(4, 8))


def test_a_general_fixed_point_is_found_on_the_gpu():
    x0 = torch.zeros(4, 3, device="cuda")
    x = fixed_point(lambda x: torch.cos(x) / 2, x0, solver=Anderson()).x
    torch.testing.assert_close(x, torch.cos(x) / 2)
