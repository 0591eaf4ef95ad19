"""Modules: parameters, initialisation and forward; nothing of how an equilibrium is found."""

from idl.nn.implicit_model import ImplicitModel

__all__ = ["ImplicitModel"]
