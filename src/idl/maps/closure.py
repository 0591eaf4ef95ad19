"""From a function that a user writes to a pure function of its state and of every tensor it reads."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


def captured_tensors(function: Callable[..., Any], arguments: Iterable[Any]) -> tuple[list[Tensor], Any]:
    """Run ``function`` once; return the tensors it reads beside its arguments, and its result without a gradient.

    They are what a closure holds: parameters of a module, tensors of an outer scope. Tensors that the function makes
    itself do not count.

    Raises:
        ValueError: If the result depends on a tensor with a gradient that no torch operation was seen to read, as a
            custom ``autograd.Function`` may do.
    """
    arguments = pytree.tree_map_only(Tensor, Tensor.detach, tuple(arguments))
    with _Watch(pytree.tree_leaves(arguments)) as watch, torch.enable_grad():
        result = function(*arguments)
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(result)):
        raise ValueError(
            "`f` reads a tensor that requires a gradient inside a custom autograd.Function, where it cannot be seen. "
            "Pass it as a parameter: fixed_point(f, x0, tensor)."
        )
    return list(watch.captured.values()), result


def with_captured(
    function: Callable[..., Any], originals: list[Tensor], values: Iterable[Tensor]
) -> Callable[..., Any]:
    """Return ``function`` with each of the captured ``originals`` replaced by one of ``values``.

    A derivative calls it long after the solve, when the names in ``function`` may mean other tensors: see
    :func:`~idl.maps.binding.pinned`.
    """
    substitute = {id(original): value for original, value in zip(originals, values, strict=True)}

    def replaced(*arguments: Any) -> Any:
        with _Substitute(substitute):
            return function(*arguments)

    return replaced


class _Watch(TorchFunctionMode):
    """Notes every tensor that comes from outside, and hands its value on without its gradient."""

    def __init__(self, known: Iterable[Any]) -> None:
        super().__init__()
        self.known = {id(leaf): leaf for leaf in known if isinstance(leaf, Tensor)}  # held, so that ids stay unique
        self.captured: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def note(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or id(leaf) in self.known:
                return leaf
            self.captured[id(leaf)] = leaf
            return leaf.detach()

        args, kwargs = pytree.tree_map(note, (args, kwargs or {}))
        result = func(*args, **kwargs)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf) not in self.captured:
                self.known[id(leaf)] = leaf
        return result


class _Substitute(TorchFunctionMode):
    """Puts other tensors in the place of those that were captured."""

    def __init__(self, substitute: dict[int, Tensor]) -> None:
        super().__init__()
        self.substitute = substitute

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def swap(leaf: Any) -> Any:
            return self.substitute.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf

        args, kwargs = pytree.tree_map(swap, (args, kwargs or {}))
        return func(*args, **kwargs)
