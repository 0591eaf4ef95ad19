"""Every public name says what it is, what it takes and how it is used. That the examples run is for the doctests."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

API = Path(__file__).parents[1] / "docs" / "api"

MODULES = (
    "idl",
    "idl.data",
    "idl.differentiation",
    "idl.models",
    "idl.nn",
    "idl.sim",
    "idl.sim.solvers",
    "idl.solvers",
    "idl.training",
    "idl.wellposed",
)


def _callables():
    """Return each public class and function once, by its first name."""
    found = {}
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                found.setdefault(value, f"{module.__name__}.{name}")
    return {name: value for value, name in found.items()}


def _methods():
    """Return each public method that a public class writes."""
    for name, owner in _callables().items():
        if inspect.isclass(owner):
            for method, value in vars(owner).items():
                function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
                if not method.startswith("_") and (inspect.isfunction(function) or isinstance(value, property)):
                    yield f"{name}.{method}", owner, method, value


def _unnamed(function, documentation):
    parameters = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    if len(parameters) == 1 and inspect.isfunction(function):  # a sentence can say what it takes
        return []
    return [name for name in parameters if not re.search(rf"\b{name}\b", documentation)]


@pytest.mark.parametrize("name", _callables())
def test_a_public_name_has_a_docstring_that_names_its_arguments_and_an_example(name):
    value = _callables()[name]
    documentation = inspect.cleandoc((vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__) or "")
    assert documentation, "no docstring"
    plain_error = inspect.isclass(value) and issubclass(value, Exception)  # takes a message
    if not plain_error:
        assert not _unnamed(value, documentation), "arguments that the docstring does not name"
    assert ">>>" in documentation or "Example:\n    See :func:" in documentation, "no example"


@pytest.mark.parametrize("name", [name for name, *_ in _methods()])
def test_a_public_method_has_a_docstring_that_names_its_arguments(name):
    owner, method, value = next(found[1:] for found in _methods() if found[0] == name)
    written = [
        vars(base)[method].__doc__ or "" for base in owner.__mro__ if method in vars(base) and base.__name__ != "Module"
    ]
    assert written[0], "no docstring"
    if not isinstance(value, property):
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        assert not _unnamed(function, " ".join(written)), "arguments that neither it nor what it overrides names"


def test_every_public_name_is_on_a_page_of_the_documentation():
    pages = " ".join(path.read_text(encoding="utf-8") for path in API.glob("*.md"))
    names = {name for module in map(importlib.import_module, MODULES) for name in module.__all__}
    assert sorted(name for name in names if not re.search(rf"\b{name}\b", pages)) == []
