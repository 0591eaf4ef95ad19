"""Where a model attends to itself, and what takes its place."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn


class Site(NamedTuple):
    """A place of self-attention: the module that holds it, its name there, and what makes its replacement.

    ``make`` is ``None`` where the attention is implicit already.
    """

    parent: nn.Module
    name: str
    make: Callable[[dict[str, Any]], nn.Module] | None
    """From settings of :class:`~idl.IDLAttention` by name to the new module."""


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear map of these numbers, which it copies; it trains if they do."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    made.weight.requires_grad_(weight.requires_grad)
    if bias is not None:
        made.bias.requires_grad_(bias.requires_grad)
    return made


def scaled(query: nn.Linear, factor: float) -> nn.Linear:
    """Return the map of queries times a factor, which scales the scores."""
    bias = cast(Tensor | None, query.bias)
    return linear(query.weight * factor, None if bias is None else bias * factor)


def allowed_keys(name: str, mask: Tensor) -> Tensor:
    """Return where a query reads a key, from what is true there, or is added to scores: 0, or hugely negative.

    Raises:
        ValueError: If other numbers are added: a bias is no part of implicit attention.
    """
    if not mask.is_floating_point():
        return mask.bool()
    kept = mask == 0
    if not bool((kept | (mask <= -1e4)).all()):
        raise ValueError(
            f"`{name}` must add 0 where a query reads a key and a hugely negative number elsewhere; got other "
            "numbers. Implicit attention takes no bias on its scores."
        )
    return kept
