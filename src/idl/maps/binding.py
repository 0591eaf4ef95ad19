"""What the names of a function are bound to, kept for the time when a derivative runs it again."""

import dis
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from idl.transforms import transforms_are_active

# Objects that are looked into for what a function reads: enough for any model, few beside a solve.
_MOST_OBJECTS = 10_000
_DELETED = object()


def pinned(function: Callable[..., Any], captured: list[Tensor]) -> Callable[..., Any]:
    """Return ``function`` as it reads now, whatever is bound to its names later.

    The variables of closures and globals that it reads are what they are now, and the captured tensors are where they
    are now: parameters, buffers and other attributes of modules and objects, items of lists and dicts. What is there
    by the time of a call is put back after it. Where nothing can be differentiated later it is ``function`` itself.
    """
    if not torch.is_grad_enabled() and not transforms_are_active():
        return function
    places = _places(function, captured)

    def as_it_was(*arguments: Any) -> Any:
        with _held(places):
            return function(*arguments)

    return as_it_was if places else function


class _Place(NamedTuple):
    """Where a function finds a value: an item of a dict or list, or the contents of a variable of a closure."""

    holder: Any
    key: Any
    value: Any

    def read(self) -> Any:
        try:
            return self.holder.cell_contents if isinstance(self.holder, CellType) else self.holder[self.key]
        except (KeyError, IndexError, ValueError):
            return _DELETED

    def write(self, value: Any) -> None:
        if value is _DELETED and isinstance(self.holder, CellType):
            del self.holder.cell_contents
        elif value is _DELETED:
            del self.holder[self.key]
        elif isinstance(self.holder, CellType):
            self.holder.cell_contents = value
        else:
            self.holder[self.key] = value


@contextmanager
def _held(places: list[_Place]) -> Iterator[None]:
    changed = [(place, now) for place in places if (now := place.read()) is not place.value]
    for place, _ in changed:
        place.write(place.value)
    try:
        yield
    finally:
        for place, now in changed:
            if place.read() is place.value:  # the function itself has not written there
                place.write(now)


def _places(function: Callable[..., Any], captured: list[Tensor]) -> list[_Place]:
    """Find what a function's names are bound to, and the ways by which it has the captured tensors, shortest first."""
    sought = {id(tensor): tensor for tensor in captured}
    missing, seen = set(sought), {id(function)}
    open_ = deque[tuple[Any, tuple[_Place, ...]]]([(function, ())])
    places: dict[tuple[int, Any], _Place] = {}
    while open_ and len(seen) < _MOST_OBJECTS and (missing or isinstance(open_[0][0], _FUNCTIONS)):
        thing, way = open_.popleft()
        for place in _contents(thing):
            value = place.value
            onward = way if place.holder is None or isinstance(place.holder, tuple) else (*way, place)
            found = isinstance(value, Tensor) and sought.get(id(value)) is value
            if found:
                missing.discard(id(value))
            if found or isinstance(thing, FunctionType):
                places.update(((id(step.holder), step.key), step) for step in onward)
            if id(value) not in seen and not isinstance(value, _LEAVES):
                seen.add(id(value))
                open_.append((value, onward))
    return list(places.values())


_FUNCTIONS = (FunctionType, MethodType, partial)
_LEAVES = (Tensor, type, ModuleType, str, int, float, NoneType)
_HOOKS = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}  # and what else torch keeps in a module


def _contents(thing: Any) -> Iterator[_Place]:
    """Yield what an object holds, and where; what cannot be bound anew has no holder."""
    if isinstance(thing, FunctionType):
        assigned = _assigned(thing.__code__)  # those that count its calls, say
        for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
            if name not in assigned:
                with suppress(ValueError):  # not bound yet
                    yield _Place(cell, None, cell.cell_contents)
        for name in _names(thing.__code__) - assigned:
            if name in thing.__globals__:
                yield _Place(thing.__globals__, name, thing.__globals__[name])
        parts: tuple[Any, ...] = (thing.__defaults__, thing.__kwdefaults__)
    elif isinstance(thing, MethodType):
        parts = (thing.__func__, thing.__self__)
    elif isinstance(thing, partial):
        parts = (thing.func, thing.args, thing.keywords)
    elif isinstance(thing, dict):
        yield from (_Place(thing, key, value) for key, value in list(thing.items()))
        return
    elif isinstance(thing, (list, tuple)):
        yield from (_Place(thing, i, value) for i, value in enumerate(thing))
        return
    elif isinstance(thing, nn.Module):
        own = vars(thing)
        yield from (_Place(own, name, own[name]) for name in own.keys() - _HOOKS)
        parts = (type(thing).forward,)
    elif hasattr(thing, "__dict__"):
        parts = (vars(type(thing)).get("__call__"), vars(thing))
    else:
        return
    yield from (_Place(None, None, part) for part in parts)


def _names(code: CodeType) -> set[str]:
    """Return the names that a function and those inside of it look up."""
    return set(code.co_names).union(*(_names(part) for part in code.co_consts if isinstance(part, CodeType)))


@lru_cache(maxsize=1024)
def _assigned(code: CodeType) -> frozenset[str]:
    """Return the names outside of it that a function binds by itself, ``nonlocal`` or ``global``."""
    binds = ("STORE_DEREF", "STORE_GLOBAL", "DELETE_DEREF", "DELETE_GLOBAL")
    own = {step.argval for step in dis.get_instructions(code) if step.opname in binds}
    return frozenset(own.union(*(_assigned(part) for part in code.co_consts if isinstance(part, CodeType))))
