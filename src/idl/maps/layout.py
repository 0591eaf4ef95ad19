"""How a state, any nest of tensors, is the one matrix ``(rows, n)`` that solvers see, and back."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from idl import checks


class StateLayout:
    """The layout of the states that are like ``x0``.

    Where every tensor has two dimensions or more and the same first size, that dimension counts the rows; otherwise the
    whole state is one row.

    Args:
        x0: A nest of lists, tuples and dicts of floating-point tensors of one dtype and device.

    Raises:
        TypeError, ValueError: If ``x0`` is not such a nest.
    """

    def __init__(self, x0: Any) -> None:
        leaves, self.structure = pytree.tree_flatten(x0)
        if not leaves:
            raise ValueError("`x0` must hold at least one tensor; got an empty structure.")
        named = {f"x0[{i}]" if len(leaves) > 1 else "x0": leaf for i, leaf in enumerate(leaves)}
        for name, leaf in named.items():
            checks.dense_tensor(name, leaf)
        checks.same_device_and_dtype(named)
        self.dtype = leaves[0].dtype
        self.shapes = [leaf.shape for leaf in leaves]
        self.batched = all(len(s) >= 2 and s[0] == self.shapes[0][0] for s in self.shapes)
        self.rows = self.samples = self.shapes[0][0] if self.batched else 1
        self.sizes = [s[1:].numel() if self.batched else s.numel() for s in self.shapes]

    def as_one_row(self) -> "StateLayout":
        """Return the layout that takes all samples for one row."""
        layout = copy.copy(self)
        layout.samples, layout.rows, layout.sizes = self.rows, 1, [s.numel() for s in self.shapes]
        return layout

    def a_number_each(self, values: Tensor) -> Tensor:
        """Return for each sample its number, from the numbers of the rows."""
        return values[0] if not self.batched else values.expand(self.samples)

    def pack(self, state: Any) -> Tensor:
        """Return the state as one matrix."""
        parts = [
            leaf.reshape(self.rows, size) for leaf, size in zip(pytree.tree_leaves(state), self.sizes, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def unpack(self, x: Tensor) -> Any:
        """Return the state that a matrix stands for."""
        parts = torch.split(x, self.sizes, 1) if len(self.sizes) > 1 else (x,)
        return pytree.tree_unflatten(
            [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)], self.structure
        )

    def check(self, image: Any) -> None:
        """Check that ``f(x0)`` is a state like ``x0``."""
        leaves, structure = pytree.tree_flatten(image)
        if structure != self.structure:
            raise ValueError(f"`f` must return a state of the structure of x0, {self.structure}; got {structure}.")
        for leaf, shape in zip(leaves, self.shapes, strict=True):
            if not isinstance(leaf, Tensor) or leaf.shape != shape:
                got = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
                raise ValueError(f"`f` must return tensors of the shapes of x0; expected {tuple(shape)}, got {got}.")
            if leaf.dtype != self.dtype and not torch.is_autocast_enabled(leaf.device.type):
                raise TypeError(f"`f` must return the dtype of x0, {self.dtype}; got {leaf.dtype}.")
