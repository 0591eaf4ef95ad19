"""Linear recurrences solved at all places together."""

import torch
from torch import Tensor


def scan(J: Tensor, b: Tensor) -> Tensor:
    r"""Return all :math:`h_t = J_th_{t-1} + b_t` from :math:`h_{-1} = 0`, by odd-even reduction (Blelloch 1990).

    Each pair of places becomes one, the recurrence of half the length is solved the same way, and the places between
    follow from it. About ``T`` products of ``h x h`` matrices instead of ``T`` products with vectors, but only
    ``2 log2 T`` operations one after another.

    Args:
        J: Transitions, ``(T, batch, h, h)``.
        b: Sources, ``(T, batch, h)``.
    """
    T = len(J)
    if T <= 1:
        return b.clone()
    pairs = T // 2
    even, odd = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    # From the place before a pair to its second place; the first place of all has nothing before it.
    sources = b[odd] + _times(J[odd], b[even])
    h = torch.empty_like(b)
    h[odd] = scan(J[odd] @ J[even], sources)
    h[0] = b[0]
    between = slice(2, None, 2)
    h[between] = b[between] + _times(J[between], h[1 : T - 1 : 2])
    return h


def _times(J: Tensor, h: Tensor) -> Tensor:
    return (J @ h[..., None])[..., 0]
