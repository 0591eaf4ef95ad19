"""Checks of what a caller passed: one function per fact, each raises an error that names the argument."""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


def positive_integer(name: str, value: object) -> int:
    """Return ``value`` if it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an integer >= 1; got {value!r} of type {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"`{name}` must be an integer >= 1; got {value!r}.")
    return int(value)


def non_negative_integer(name: str, value: object) -> int:
    """Return ``value`` if it is an integer of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an integer >= 0; got {value!r} of type {type(value).__name__}.")
    if value < 0:
        raise ValueError(f"`{name}` must be an integer >= 0; got {value!r}.")
    return int(value)


def non_negative(name: str, value: object) -> float:
    """Return ``value`` if it is a finite real number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a real number >= 0; got {value!r} of type {type(value).__name__}.")
    number = float(value)
    if not (number >= 0 and math.isfinite(number)):
        raise ValueError(f"`{name}` must be finite and >= 0; got {value!r}.")
    return number


def positive(name: str, value: object) -> float:
    """Return ``value`` if it is a finite real number above 0."""
    number = _real(name, value)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"`{name}` must be finite and > 0; got {value!r}.")
    return number


def finite(name: str, value: object) -> float:
    """Return ``value`` if it is a finite real number."""
    number = _real(name, value)
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be finite; got {value!r}.")
    return number


def in_open_unit(name: str, value: object, advice: str = "") -> float:
    """Return ``value`` if it lies strictly between 0 and 1."""
    number = _real(name, value)
    if not 0 < number < 1:
        raise ValueError(f"`{name}` must lie strictly between 0 and 1; got {value!r}.{advice and ' ' + advice}")
    return number


def in_half_open_unit(name: str, value: object) -> float:
    """Return ``value`` if it lies in ``(0, 1]``."""
    number = _real(name, value)
    if not 0 < number <= 1:
        raise ValueError(f"`{name}` must lie in (0, 1]; got {value!r}.")
    return number


def in_unit(name: str, value: object) -> float:
    """Return ``value`` if it is in [0, 1]."""
    number = _real(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"`{name}` must lie in [0, 1]; got {value!r}.")
    return number


def boolean(name: str, value: object) -> bool:
    """Return ``value`` if it is ``True`` or ``False``."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False; got {value!r}.")
    return value


def one_of(name: str, value: object, choices: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of the strings ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}.")
    return value


def instance(name: str, value: _T, kind: type, advice: str) -> _T:
    """Return ``value`` if it is an instance of ``kind``."""
    if not isinstance(value, kind):
        text = repr(value)
        got = text if len(text) <= 80 else f"a {type(value).__name__}"  # not all numbers of a tensor
        raise TypeError(f"`{name}` must be an instance of {kind.__name__}; got {got}. {advice}")
    return value


def floating_tensor(name: str, value: object) -> Tensor:
    """Return ``value`` if it is a tensor of real floating-point numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor; got {type(value).__name__}. Try torch.as_tensor({name}).")
    if not value.is_floating_point():
        another = "its real and imaginary parts" if value.is_complex() else f"{name}.float()"
        raise TypeError(f"`{name}` must have a floating-point dtype; got {value.dtype}. Try {another}.")
    return value


def dense_tensor(name: str, value: object) -> Tensor:
    """Return ``value`` if it is a dense tensor of real floating-point numbers."""
    tensor = floating_tensor(name, value)
    if tensor.layout is not torch.strided:
        raise TypeError(f"`{name}` must be a dense tensor; got layout {tensor.layout}. Try {name}.to_dense().")
    return tensor


def square_matrix(name: str, value: object) -> Tensor:
    """Return ``value`` if it is a square matrix of floating-point numbers."""
    matrix = floating_tensor(name, value)
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"`{name}` must be a square matrix; got shape {tuple(matrix.shape)}.")
    return matrix


def same_device_and_dtype(tensors: Mapping[str, Tensor]) -> None:
    """Check that all tensors live on one device with one dtype (under autocast the dtypes may differ)."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(
                f"`{name}` is on {tensor.device} but `{first_name}` is on {first.device}. "
                f"Move one of them: {name}.to({str(first.device)!r})."
            )
        if tensor.dtype != first.dtype and not torch.is_autocast_enabled(first.device.type):
            raise TypeError(
                f"`{name}` has dtype {tensor.dtype} but `{first_name}` has {first.dtype}. "
                f"Convert one of them: {name}.to({first.dtype})."
            )


def _real(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a real number; got {value!r} of type {type(value).__name__}.")
    return float(value)
