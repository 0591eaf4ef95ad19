"""What is asked of torch and has no public answer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_P = ParamSpec("_P")
_T = TypeVar("_T")


def transforms_are_active() -> bool:
    """Return whether some :mod:`torch.func` transform is running, under which a tensor may stand for many values."""
    return torch._C._are_functorch_transforms_active()


def pushforward(function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    """Return the derivative of ``function`` along ``tangents``: :func:`torch.func.jvp`, in a native dual level too.

    There torch refuses its own; the derivative of the pullback, which is linear, is the same.
    """
    if forward_ad._current_level < 0 or transforms_are_active():
        moved: Tensor = torch.func.jvp(function, primals, tangents)[1]
        return moved
    image, pull, *_ = torch.func.vjp(function, *primals)
    _, push, *_ = torch.func.vjp(pull, torch.zeros_like(image))
    (moved,) = push(tangents)
    return moved


@contextmanager
def outer_forward_mode(*saved: Any) -> Iterator[list[Any]]:
    """Yield what the ``jvp`` of a function has saved, as it must compute with it for forward mode to be nested.

    Torch switches forward mode off in there, and an outer level would see constants. Switched on, the tensors still
    have the tangent of the level that this ``jvp`` is for; without it they are what the outer levels differentiate.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        yield [tensor if tensor is None else _primal(tensor) for tensor in saved]


def _primal(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    primal: Tensor = forward_ad.unpack_dual(tensor, level=0).primal  # type: ignore[no-untyped-call]
    return primal


def eagerly(function: Callable[_P, _T], *arguments: _P.args, **keywords: _P.kwargs) -> _T:
    """Call ``function`` outside any graph that torch.compile is tracing: its loops depend on the data."""
    if torch.compiler.is_compiling():
        # Here and not as a decorator, which would load the compiler with the library.
        function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return function(*arguments, **keywords)
