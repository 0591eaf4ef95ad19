"""PyTorch's own encoder layers."""

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn

from idl.nn.attention import IDLAttention
from idl.nn.conversion.sites import Site, allowed_keys, linear


class EncoderAttention(nn.Module):
    """Implicit attention with the call of :class:`torch.nn.MultiheadAttention` inside of an encoder layer.

    Args:
        attention: The attention.
        batch_first: Whether tokens are ``(batch, time, ...)``.
    """

    in_proj_bias = None  # tells the layer that its fused inference does not apply here

    def __init__(self, attention: IDLAttention, batch_first: bool) -> None:
        super().__init__()
        self.attention, self.batch_first = attention, batch_first

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        is_causal: bool = False,
        average_attn_weights: bool = True,
    ) -> tuple[Tensor, None]:
        """Return the outputs, and no weights.

        Masks are those of :class:`torch.nn.MultiheadAttention`: true, or hugely negative, where nothing is read.

        Raises:
            ValueError: If query, key and value are not the same, weights are asked for, a mask has another shape or
                adds to scores, or ``is_causal`` comes without the mask that it is a hint about.
        """
        if is_causal and attn_mask is None:
            raise ValueError("`attn_mask` must be given with is_causal=True, which is a hint about it; got None.")
        if query is not key or key is not value or need_weights:
            raise ValueError(
                "implicit attention is self-attention without weights: query, key and value must be one tensor, and "
                f"`need_weights` False; got need_weights={need_weights}."
            )
        batched = query.dim() == 3
        u = query if batched else query.unsqueeze(0 if self.batch_first else 1)
        u = u if self.batch_first else u.transpose(0, 1)
        padding = None if key_padding_mask is None else ~_read("key_padding_mask", key_padding_mask)
        padding = padding if padding is None or batched else padding[None]
        allowed = None if attn_mask is None else self._allowed(attn_mask, *u.shape[:2])
        o, _ = self.attention.outputs(u, padding, allowed=allowed)
        output = self.attention.projection(o.flatten(2))
        output = output if self.batch_first else output.transpose(0, 1)
        return output.reshape(query.shape), None

    def _allowed(self, mask: Tensor, batch: int, time: int) -> Tensor:
        heads = self.attention.n_head
        if mask.shape not in ((time, time), (batch * heads, time, time)):
            raise ValueError(
                f"`attn_mask` must have shape {(time, time)}, or {(batch * heads, time, time)} for each sequence and "
                f"head; got {tuple(mask.shape)}."
            )
        mask = _read("attn_mask", mask)
        return mask if mask.dim() == 2 else mask.view(batch, heads, time, time)


def _read(name: str, mask: Tensor) -> Tensor:
    """Return where a mask of PyTorch's lets a query read."""
    return allowed_keys(name, mask) if mask.is_floating_point() else ~mask


def sites(layer: nn.TransformerEncoderLayer) -> Iterator[Site]:
    """Return the site of an encoder layer.

    Raises:
        ValueError: If its attention reads more than the tokens.
    """
    attention: nn.Module = layer.self_attn
    if isinstance(attention, EncoderAttention):
        yield Site(layer, "self_attn", None)
    elif isinstance(attention, nn.MultiheadAttention):
        if attention.add_zero_attn or attention.bias_k is not None:
            raise ValueError(
                "`model` must not use add_zero_attn or add_bias_kv: implicit attention reads tokens alone."
            )
        yield Site(layer, "self_attn", _maker(attention))


def _maker(explicit: nn.MultiheadAttention) -> Any:
    def make(settings: dict[str, Any]) -> nn.Module:
        weights = explicit.in_proj_weight.chunk(3)
        bias = cast(Tensor | None, explicit.in_proj_bias)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        query, key, value = (linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
        settings = {"causal": False, "dropout": explicit.dropout, **settings}
        attention = IDLAttention.from_explicit(key, query, value, explicit.out_proj, explicit.num_heads, **settings)
        return EncoderAttention(attention, explicit.batch_first)

    return make
