r"""Keys, queries and values, which are linear in the state, eliminated exactly.

The state of a token is :math:`x = [k\; q\; v\; o]`, and :math:`[k\; q\; v] = Ax + Bu + b`, with
:math:`A = [A_{kqv}\; A_o]`. So :math:`[k\; q\; v] = W_oo + B'u + b'`, with
:math:`[W_o\; B'\; b'] = (I - A_{kqv})^{-1}[A_o\; B\; b]`: an equation in the output ``o`` alone is left.
"""

import torch
from torch import Tensor

from idl.linalg.operators import Factored, StateMatrix
from idl.linalg.systems import solve


def eliminate(A: StateMatrix, B: Tensor, bias: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
    r"""Return :math:`W_o`, :math:`B'` and :math:`b'` of each head.

    :math:`W_o` as a tuple: itself, ``(heads, 3 head, head)``, or its factors ``(heads, 3 head, r)`` and
    ``(heads, head, r)``.

    ``O(h^2 (h + n_embd))`` a head and call, for heads of size ``h``; ``O(r)`` times ``h + n_embd`` for factors.

    Args:
        A: Admissible state matrix of each head, ``(heads, 3 head, 4 head)``, or its factors.
        B: Input matrices, ``(heads, 3 head, n_embd)``.
        bias: ``(heads, 3 head)``.
    """
    size = B.shape[-2]
    columns = B if bias is None else torch.cat((B, bias[..., None]), -1)
    outputs: tuple[Tensor, ...]
    if isinstance(A, Factored):
        left, right = A.left, A.right
        inner, outer = right[..., :size, :], right[..., size:, :]
        small = torch.eye(left.shape[-1], dtype=left.dtype, device=left.device) - inner.mT @ left
        solved = solve(small, torch.cat((inner.mT @ columns, outer.mT), -1))
        columns = columns + left @ solved[..., : columns.shape[-1]]
        outputs = (left, solved[..., columns.shape[-1] :].mT)
    else:
        system = torch.eye(size, dtype=B.dtype, device=B.device) - A.matrix[..., :size]
        solved = solve(system, torch.cat((A.matrix[..., size:], columns), -1))
        head = size // 3
        outputs, columns = (solved[..., :head],), solved[..., head:]
    if bias is None:
        return outputs, columns, None
    return outputs, columns[..., :-1], columns[..., -1]


def with_outputs(source: Tensor, from_output: tuple[Tensor, ...], o: Tensor) -> Tensor:
    """Return ``[k q v]``, ``(batch, heads, time, 3 head)``, from what the input gives and from outputs."""
    *right, left = from_output[::-1]
    s = o @ right[0] if right else o
    # Product and sum in one call, and of a single head all tokens together: this takes half the time of the obvious.
    if len(left) == 1:
        flat = torch.addmm(source.reshape(-1, source.shape[-1]), s.reshape(-1, s.shape[-1]), left[0].T)
    else:
        each = left.mT.expand(len(source), *left.mT.shape)
        flat = torch.baddbmm(source.flatten(0, 1), s.flatten(0, 1), each.flatten(0, 1))
    return flat.view(source.shape)


def dense(from_output: tuple[Tensor, ...]) -> Tensor:
    """Return :math:`W_o`, ``(heads, 3 head, head)``."""
    return from_output[0] if len(from_output) == 1 else from_output[0] @ from_output[1].mT
