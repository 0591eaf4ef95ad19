r"""A bound on the contraction of Lipschitz attention as an equilibrium, the coupling of tokens included.

In the norm :math:`\max_{t, i} |o_{ti}|`, over all tokens and entries. Let :math:`W_q, W_k, W_v` be what an output adds
to its query, key and value, and let :math:`p_{ij}` and :math:`g` be as in
:class:`~idl.attention.forms.LipschitzAttention`, for at most ``N`` keys. Then :math:`\sum_j p_{ij} \le m < 1` with
:math:`m = N / (N + 1/4)`, :math:`|g| < 1` and :math:`0 < g' \le 1`, so that along a change of norm 1

.. math::
    |\dot o_i|_\infty \le m \|W_v\|_\infty
    + 2 (1 + m) \, S_N \, \big(\|W_q\|_{\infty, 2} + \|W_k\|_{\infty, 2}\big),
    \quad S_N = \sup_r \frac{N r e^{-r^2}}{1/4 + N e^{-r^2}}.

The second term: :math:`\dot p_{ij} = p_{ij} (\dot s_{ij} - \sum_l p_{il} \dot s_{il})` with
:math:`|\dot s_{ij}| = 2 |(q_i - k_j) \cdot (\dot q_i - \dot k_j)| \le 2 r_{ij} (|\dot q_i|_2 + |\dot k_j|_2)` and
:math:`r_{ij} = |q_i - k_j|_2`. So :math:`\sum_j \dot p_{ij} g(v_j) = \sum_j p_{ij} \dot s_{ij} (g(v_j) - o_i)`, where
:math:`|g(v_j) - o_i|_\infty \le 1 + m`. And :math:`\sum_j p_{ij} r_{ij}` is largest where all :math:`r_{ij}` are equal,
as it is a ratio of sums over ``j`` of the same two functions: at :math:`r^2 = 1/2 + W_0(2 N e^{-1/2})`, with Lambert's
function, where it is :math:`r - 1 / (2r)`. Dropout multiplies weights by 0 or ``c``, and the bound by ``c``: the first
term, and the second as :math:`g(v_j)` becomes at most ``c`` in magnitude and :math:`o_i` at most :math:`cm`. The bound
was derived here; that an offset of 1/4 bounds the slope is the idea of the Lipschitz form.
"""

import math

import torch
from torch import Tensor

from idl.attention.forms import OFFSET


def contraction_bound(W: Tensor, keys: int) -> Tensor:
    r"""Return the bound for each head; the equilibrium is unique, and found, where it is below 1.

    It is homogeneous: ``W`` times a factor gives the bound times its magnitude.

    Args:
        W: What an output adds to its key, query and value, ``(heads, 3 head, head)``.
        keys: Most keys that a query reads.
    """
    to_key, to_query, to_value = W.chunk(3, -2)
    mass = keys / (keys + OFFSET)
    by_value = mass * to_value.abs().sum(-1).amax(-1)
    return by_value + 2 * (1 + mass) * _mean_distance(keys) * (_in_two_norm(to_key) + _in_two_norm(to_query))


def _in_two_norm(W: Tensor) -> Tensor:
    r"""Return a bound on :math:`\|W\|_{\infty, 2}`, the 2-norm of an image of a vector of entries up to 1."""
    by_rows = torch.linalg.vector_norm(W.abs().sum(-1), dim=-1)
    return torch.minimum(by_rows, W.shape[-1] ** 0.5 * torch.linalg.matrix_norm(W, 2))


def _mean_distance(keys: int) -> float:
    r"""Return :math:`S_N`, the largest of :math:`\sum_j p_{ij} r_{ij}`; by Newton's method on Lambert's equation."""
    target = keys / (2 * OFFSET) * math.exp(-0.5)
    w = math.log1p(target)
    for _ in range(20):
        w -= (w - target * math.exp(-w)) / (1 + w)
    r = math.sqrt(0.5 + w)
    return r - 1 / (2 * r)
