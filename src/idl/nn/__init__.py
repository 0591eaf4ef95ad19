"""Modules: parameters, initialisation and forward; nothing of how an equilibrium is found."""

from idl.nn.attention import IDLAttention, IDLHead
from idl.nn.conversion import convert_attention, implicit_class
from idl.nn.implicit_model import ImplicitModel
from idl.nn.implicit_rnn import ImplicitRNN, ImplicitRNNCell
from idl.nn.sparse import SparseImplicitModel

__all__ = [
    "IDLAttention",
    "IDLHead",
    "ImplicitModel",
    "ImplicitRNN",
    "ImplicitRNNCell",
    "SparseImplicitModel",
    "convert_attention",
    "implicit_class",
]
