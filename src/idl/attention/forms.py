"""How tokens attend: the softmax form and the Lipschitz form, each by torch's kernel and as a formula."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

OFFSET = 0.25  # of the Lipschitz form's sum of weights: bounds its slope with untied queries and keys


@dataclass(frozen=True)
class Reach:
    """Which keys each query may read.

    Args:
        causal: Whether each query reads its own key and those before; the queries are those of the last keys.
        allowed: Which keys are read besides, to be broadcast to ``(batch, heads, queries, keys)``; ``None`` for all.
    """

    causal: bool
    allowed: Tensor | None = None

    def mask(self, q: Tensor, k: Tensor) -> Tensor | None:
        """Return where a query reads a key; ``None`` for everywhere."""
        queries, keys = q.shape[-2], k.shape[-2]
        if not self.causal or queries == 1:
            return self.allowed
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril_(keys - queries)
        return mask if self.allowed is None else mask & self.allowed

    def is_plainly_causal(self, q: Tensor, k: Tensor) -> bool:
        """Return whether each of a sequence's tokens reads all up to itself, and no other rule applies."""
        return self.causal and self.allowed is None and q.shape[-2] == k.shape[-2]


@dataclass(frozen=True)
class AbstractAttention(ABC):
    """What queries read of keys and values, ``(batch, heads, time, head)`` each."""

    @abstractmethod
    def fused(self, q: Tensor, k: Tensor, v: Tensor, reach: Reach) -> Tensor:
        """Return the outputs by torch's kernel, which keeps no ``(time, time)`` matrix and has one derivative."""

    def formula(self, q: Tensor, k: Tensor, v: Tensor, reach: Reach, keep: Tensor | None) -> Tensor:
        """Return the outputs as :meth:`fused` does, differentiable in any order and mode.

        ``keep`` has a factor for each weight, as dropout gives it.
        """
        weights = self.weights(q, k, reach.mask(q, k))
        return (weights if keep is None else weights * keep) @ self.values(v)

    @abstractmethod
    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """Return the weight of each key for each query, 0 where the mask is false."""

    @abstractmethod
    def values(self, v: Tensor) -> Tensor:
        """Return what is summed with these weights."""


@dataclass(frozen=True)
class SoftmaxAttention(AbstractAttention):
    r""":math:`\mathrm{softmax}(qk^T/\sqrt{h})\,v`. Not Lipschitz on unbounded inputs (Kim et al. 2021, theorem 3.1)."""

    def fused(self, q: Tensor, k: Tensor, v: Tensor, reach: Reach) -> Tensor:
        """Return the outputs; see :class:`AbstractAttention`."""
        if reach.is_plainly_causal(q, k):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mask = reach.mask(q, k)
        outputs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if reach.allowed is None or mask is None:
            return outputs
        return outputs.where(mask.any(-1, keepdim=True), 0)  # older kernels give NaN to a query that reads nothing

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """Return the weights; all are 0 for a query that reads nothing."""
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if mask is None:
            return scores.softmax(-1)
        # The smallest number instead of -inf, which would make a row of nothing NaN, in its derivative too.
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask

    def values(self, v: Tensor) -> Tensor:
        """Return the values as they are."""
        return v


@dataclass(frozen=True)
class LipschitzAttention(AbstractAttention):
    r""":math:`\sum_j p_{ij}\, g(v_j)` with :math:`p_{ij} = w_{ij} / (1/4 + \sum_l w_{il})`.

    :math:`w_{ij} = e^{-|q_i - k_j|^2}` and :math:`g(v) = v / \sqrt{1 + v^2}`: its slope is bounded on all inputs.
    """

    def fused(self, q: Tensor, k: Tensor, v: Tensor, reach: Reach) -> Tensor:
        r"""Return the outputs; see :class:`AbstractAttention`.

        A softmax over :math:`2 q_i k_j - |k_j|^2`, and over :math:`|q_i|^2 + \log 1/4` for the offset, which reads 0.
        """
        offset = (q * q).sum(-1, keepdim=True) + math.log(OFFSET)
        queries = torch.cat((2 * q, -torch.ones_like(offset), offset), -1)
        keys = F.pad(torch.cat((k, (k * k).sum(-1, keepdim=True)), -1), (0, 1, 1, 0))
        keys[..., 0, -1] = 1
        values = F.pad(self.values(v), (0, 2, 1, 0))  # the kernel wants them as long as queries and keys
        mask = reach.mask(q, k)
        mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=1.0)[..., :-2]

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """Return the weights, of a sum below 1."""
        squares = (q * q).sum(-1)[..., :, None] + (k * k).sum(-1)[..., None, :]
        weights = torch.exp(2 * q @ k.mT - squares)
        weights = weights if mask is None else weights * mask
        return weights / (OFFSET + weights.sum(-1, keepdim=True))

    def values(self, v: Tensor) -> Tensor:
        """Return the values, brought into (-1, 1)."""
        return v * (1 + v * v).rsqrt()


BY_NAME: dict[str, AbstractAttention] = {"softmax": SoftmaxAttention(), "lipschitz": LipschitzAttention()}
"""The forms by the name that users give."""
