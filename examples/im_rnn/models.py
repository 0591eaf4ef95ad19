"""What an ImplicitRNN is compared with, each with as nearly as many parameters as it as its sizes allow."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from idl import ImplicitRNN

MODELS = ("implicit", "lstm", "gru", "relu", "linear")


class LastStep(nn.Module):
    """A recurrent module of PyTorch's, and a linear map of its state after the last step."""

    def __init__(self, recurrent: nn.RNNBase, output_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.linear = nn.Linear(recurrent.hidden_size, output_dim, bias)

    def forward(self, sequences: Tensor) -> Tensor:
        """Return ``(batch, output_dim)`` of ``(batch, time, input_dim)``."""
        states, _ = self.recurrent(sequences)
        prediction: Tensor = self.linear(states[:, -1])
        return prediction


def build(name: str, input_dim: int, output_dim: int, length: int, sizes: tuple[int, int], seed: int) -> nn.Module:
    """Return an untrained model.

    Args:
        name: One of :data:`MODELS`: the ImplicitRNN, ``nn.LSTM``, ``nn.GRU``, a ReLU recurrence without biases (which
            like an ImplicitRNN without biases commutes with the scale of its input), or a linear map of the window.
        input_dim: Numbers at each step.
        output_dim: Numbers to predict.
        length: Steps of a sequence.
        sizes: ``hidden_dim`` and ``implicit_hidden_dim`` of the ImplicitRNN.
        seed: Decides the first weights.
    """
    torch.manual_seed(seed)
    hidden, implicit = sizes
    if name == "implicit":
        return ImplicitRNN(input_dim, output_dim, hidden, implicit)
    if name == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(length * input_dim, output_dim))
    makers: dict[str, Callable[[int], nn.Module]] = {
        "lstm": lambda size: LastStep(nn.LSTM(input_dim, size, batch_first=True), output_dim),
        "gru": lambda size: LastStep(nn.GRU(input_dim, size, batch_first=True), output_dim),
        "relu": lambda size: LastStep(
            nn.RNN(input_dim, size, nonlinearity="relu", bias=False, batch_first=True), output_dim, bias=False
        ),
    }
    target = parameters(ImplicitRNN(input_dim, output_dim, hidden, implicit))
    size = min(range(1, 8 * hidden), key=lambda size: abs(parameters(makers[name](size)) - target))
    torch.manual_seed(seed)
    return makers[name](size)


def parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
