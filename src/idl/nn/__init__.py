"""Modules: parameters, initialisation and forward; nothing of how an equilibrium is found."""

from idl.nn.implicit_model import ImplicitModel
from idl.nn.implicit_rnn import ImplicitRNN, ImplicitRNNCell
from idl.nn.sparse import SparseImplicitModel

__all__ = ["ImplicitModel", "ImplicitRNN", "ImplicitRNNCell", "SparseImplicitModel"]
