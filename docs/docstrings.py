"""Docstrings for mkdocstrings: the roles that they are written with become Markdown.

Names are looked up where they are written. One that has an entry in the API pages becomes a link to it.
"""

import re
from typing import Any

from griffe import Alias, Extension, Module, Object

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`([^`]+)`")
_MATH = re.compile(r":math:`([^`]+)`")
_DISPLAYED = re.compile(r"^([ \t]*)\.\. math::[ \t]*(.*(?:\n(?:\1[ \t]+\S.*|[ \t]*(?=\n\1[ \t]+\S)))*)", re.MULTILINE)
_EXAMPLE = re.compile(r"^([ \t]*)Example:$", re.MULTILINE)


class Roles(Extension):
    """Rewrite the docstrings of a package once it is loaded."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Rewrite every docstring below ``pkg``."""
        _rewrite(pkg)


def _rewrite(owner: Object) -> None:
    if owner.docstring is not None:
        owner.docstring.value = _as_markdown(owner.docstring.value, owner)
    for member in owner.members.values():
        if not isinstance(member, Alias):
            _rewrite(member)


def _as_markdown(text: str, owner: Object) -> str:
    text = _DISPLAYED.sub(_display, text)
    text = _MATH.sub(r"$\1$", text)
    text = _ROLE.sub(lambda match: _reference(match[1], owner), text)
    return _EXAMPLE.sub(r"\1Examples:", text)


def _display(match: re.Match[str]) -> str:
    indent, tex = match[1], " ".join(match[2].split())
    return f"{indent}$$\n{indent}{tex}\n{indent}$$"


def _reference(target: str, owner: Object) -> str:
    shown = target.removeprefix("~").rsplit(".", 1)[-1] if target.startswith("~") else target
    return (
        f'<autoref optional identifier="{_full_name(target.removeprefix("~"), owner)}"><code>{shown}</code></autoref>'
    )


def _full_name(name: str, owner: Object) -> str:
    if name.startswith(("idl.", "torch.")):
        return name
    first, _, rest = name.partition(".")
    scope: Any = owner
    while scope is not None:
        if first in scope.members:
            found = scope.members[first]
            path = found.target_path if isinstance(found, Alias) else found.path
            return f"{path}.{rest}" if rest else path
        scope = scope.parent
    return name
