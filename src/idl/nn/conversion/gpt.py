"""Our own GPT."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from idl.models.gpt import GPTLanguageModel, Head, SelfAttention
from idl.nn.attention import IDLAttention
from idl.nn.conversion.sites import Site, linear


def sites(model: GPTLanguageModel) -> Iterator[Site]:
    """Return a site for each block whose heads are all explicit, or that is converted."""
    for block in model.blocks:
        if isinstance(block.sa, SelfAttention) and all(isinstance(head, Head) for head in block.sa.heads):
            yield Site(block, "sa", _maker(block.sa, model.block_size))
        elif isinstance(block.sa, IDLAttention):
            yield Site(block, "sa", None)


def _maker(attention: SelfAttention, block_size: int) -> Any:
    def make(settings: dict[str, Any]) -> nn.Module:
        if settings.get("causal") is False:
            raise ValueError("`causal` must be True in a GPTLanguageModel, whose tokens would read what they predict.")
        heads: list[Any] = list(attention.heads)
        key, query, value = (
            linear(torch.cat([getattr(head, name).weight for head in heads]), None)
            for name in ("key", "query", "value")
        )
        settings = {"block_size": block_size, "dropout": heads[0].dropout, **settings}
        return IDLAttention.from_explicit(key, query, value, attention.projection, len(heads), **settings)

    return make
