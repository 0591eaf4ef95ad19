"""Explicit self-attention replaced by implicit attention that starts at the same function."""

from idl.nn.conversion.convert import convert_attention, implicit_class

__all__ = ["convert_attention", "implicit_class"]
