"""The language models that are compared: an explicit GPT, and the same with implicit attention."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from idl import IDLAttention
from idl.models.gpt import GPTLanguageModel
from idl.nn import convert_attention

MODELS = ("explicit", "wide", "softmax", "lipschitz", "low-rank", "continued", "converted")
IMPLICIT = ("softmax", "lipschitz", "low-rank")
FINE_TUNED = ("continued", "converted")
"""Models that begin with the weights of a trained explicit one."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a GPT."""

    n_embd: int
    block_size: int
    n_layer: int
    n_head: int
    dropout: float


class NextCharacter(nn.Module):
    """A GPT whose scores have the classes second, as a loss wants them."""

    def __init__(self, gpt: GPTLanguageModel) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, characters: Tensor) -> Tensor:
        """Return scores ``(batch, vocabulary, time)`` of integers ``(batch, time)``."""
        logits: Tensor = self.gpt(characters)[0]
        return logits.transpose(1, 2)

    def attentions(self) -> list[IDLAttention]:
        """Return the implicit attentions."""
        return [module for module in self.modules() if isinstance(module, IDLAttention)]


def build(name: str, vocabulary: int, shape: Shape, seed: int) -> NextCharacter:
    """Return an untrained model.

    Args:
        name: One of :data:`MODELS`: explicit; explicit and as much wider as makes its parameters those of softmax;
            implicit softmax; implicit Lipschitz; implicit softmax with ``A`` of rank 4; and, both with the parameters
            of a trained explicit model to be loaded, explicit, and converted to implicit softmax.
        vocabulary: Number of characters.
        shape: Sizes.
        seed: Decides the first weights.
    """
    torch.manual_seed(seed)
    if name == "wide":
        target = parameters(build("softmax", vocabulary, shape, seed))
        sizes = range(shape.n_embd, 2 * shape.n_embd, shape.n_head)
        width = min(sizes, key=lambda n_embd: abs(parameters(_gpt(vocabulary, shape, n_embd)) - target))
        torch.manual_seed(seed)
        return NextCharacter(_gpt(vocabulary, shape, width))
    gpt = _gpt(vocabulary, shape, shape.n_embd)
    if name in IMPLICIT:  # from the weights that the explicit model of this seed starts with, and A = 0
        version = "lipschitz" if name == "lipschitz" else "softmax"
        low_rank = name == "low-rank"
        convert_attention(gpt, attention_version=version, is_low_rank=low_rank, rank=4, **TOLERANCES)
    return NextCharacter(gpt)


TOLERANCES = {"tol": 1e-5, "grad_tol": 1e-5}


def fine_tuned(name: str, explicit: NextCharacter) -> NextCharacter:
    """Return the model that goes on from a trained explicit one."""
    if name == "converted":
        convert_attention(explicit, **TOLERANCES)
    return explicit


def parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def _gpt(vocabulary: int, shape: Shape, n_embd: int) -> GPTLanguageModel:
    return GPTLanguageModel(vocabulary, n_embd, shape.block_size, shape.n_layer, shape.n_head, shape.dropout)
