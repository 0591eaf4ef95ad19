"""On a GPU everything is as on the CPU; skipped where there is none."""

import pytest
import torch

from idl import Anderson, IDLAttention, ImplicitFunctionInf, ImplicitModel, ImplicitRNN, Newton, fixed_point

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


MODELS = {
    "full": lambda: ImplicitModel(20, 8, 3),
    "low rank": lambda: ImplicitModel(20, 8, 3, low_rank=True, rank=2),
    "Newton": lambda: ImplicitModel(20, 8, 3, f=ImplicitFunctionInf(solver=Newton())),
    "callable": lambda: ImplicitModel(20, 8, 3, activation=torch.tanh),
    "recurrent": lambda: ImplicitRNN(8, 3, 6, 10, bidirectional=True),
    "parallel in time": lambda: ImplicitRNN(8, 3, 6, 10, activation="tanh", parallel_in_time=True),
    "softmax": lambda: IDLAttention(8, 2, 12),
    "lipschitz": lambda: IDLAttention(8, 2, 12, attention_version="lipschitz"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_on_the_gpu_what_it_gives_on_the_cpu(name):
    torch.manual_seed(0)
    model, u = MODELS[name]().double(), torch.rand(16, 12, 8, dtype=torch.float64)
    u = u[:, 0] if isinstance(model, ImplicitModel) else u
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
