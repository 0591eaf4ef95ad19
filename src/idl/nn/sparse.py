"""SparseImplicitModel: an implicit model that keeps its zeros."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.autograd import forward_ad

from idl import checks
from idl.functions import StateParameters
from idl.linalg.operators import Dense, Sparse
from idl.linalg.sparse import compressed, compression_pays
from idl.nn.implicit_model import ImplicitModel
from idl.transforms import transforms_are_active

_Model = TypeVar("_Model", bound=ImplicitModel)


class SparseImplicitModel(ImplicitModel):
    """An implicit model whose zero weights stay zero: what :class:`~idl.SIM` returns.

    Parameters and ``state_dict`` are those of the :class:`ImplicitModel` it is made of. Its support, what is not zero
    when the model is made or loaded, does not change: a weight outside takes no part and gets no gradient. Without
    gradients, on a CPU, large matrices of which 7 % or less is kept multiply in compressed rows. These are made once,
    until a parameter changes; a change through ``parameter.data`` is not seen.

    Args:
        model: Model, which is copied. Of low rank it keeps the zeros of its factors ``L`` and ``R``.

    Raises:
        TypeError: If ``model`` is no implicit model.

    Example:
        >>> dense = ImplicitModel(4, 3, 2)
        >>> with torch.no_grad():
        ...     _ = dense.A.triu_(1)
        >>> SparseImplicitModel(dense).support("A").sum()
        tensor(6)
    """

    def __init__(self, model: ImplicitModel) -> None:
        checks.instance("model", model, ImplicitModel, "Build an ImplicitModel first.")
        settings = _settings(model)
        with torch.device("meta"):  # draws no random numbers
            super().__init__(**settings)
        _copy_parameters(model, self)
        self._compressed: _Compressed | None = None
        self._keep_support()

    def support(self, name: str) -> Bool[Tensor, "rows columns"]:
        """Return which entries of a matrix are there.

        Args:
            name: ``"A"`` (or ``"L"`` or ``"R"``), ``"B"``, ``"C"`` or ``"D"``.

        Raises:
            ValueError: If the model has no such matrix.
        """
        support: Tensor = getattr(self, _buffer(checks.one_of("name", name, tuple(self._dense_matrices()))))
        return support

    def to_dense(self) -> ImplicitModel:
        """Return an :class:`ImplicitModel` with the same weights, all of which train."""
        settings = _settings(self)
        with torch.device("meta"):
            model = ImplicitModel(**settings)
        return _copy_parameters(self, model)

    def reset_parameters(self) -> None:
        """Draw new parameters on the same support."""
        super().reset_parameters()
        with torch.no_grad():
            for name, matrix in self._dense_matrices().items():
                if hasattr(self, _buffer(name)):  # not yet while it is being made
                    matrix.mul_(self.support(name))

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the parentheses."""
        kept = ", ".join(f"{name} {int(self.support(name).sum())}" for name in self._dense_matrices())
        return f"{super().extra_repr()}, weights: {kept}"

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._keep_support()

    def _keep_support(self) -> None:
        for name, matrix in self._dense_matrices().items():
            self.register_buffer(_buffer(name), matrix.detach() != 0, persistent=False)

    def _dense_matrices(self) -> dict[str, Tensor]:
        return {name: matrix for name in _matrix_names(self) if (matrix := getattr(self, name)) is not None}

    def _matrices(self) -> tuple[StateParameters, Tensor, Tensor, Tensor | None]:
        matrices = self._dense_matrices()
        if not _for_inference(matrices):
            masked = self._masked(matrices)
            return _of_states(masked), masked["B"], masked["C"], masked.get("D")
        now = _state_of(matrices)
        if self._compressed is None or self._compressed.made_of != now:
            self._compressed = self._compress(matrices, now)
        return self._compressed.A, self._compressed.B, self._compressed.C, self._compressed.D

    def _compress(self, matrices: Mapping[str, Tensor], made_of: "_State") -> "_Compressed":
        """Return the matrices as inference multiplies with them: in compressed rows where that pays."""
        on = self._masked(matrices)
        B, C, *direct = (compressed(on[m]) if compression_pays(on[m]) else on[m] for m in "BCD" if m in on)
        A: StateParameters = _of_states(on)
        # Without a derivative autograd has to see A.
        if self.rank is None and compression_pays(on["A"]) and self.f.activation.derivative is not None:
            admitted = self.f.state_matrix(A)
            if type(admitted) is Dense:  # a triangular matrix has a substitution of its own
                A = Sparse(compressed(admitted.matrix))
        return _Compressed(made_of, A, B, C, direct[0] if direct else None)

    @property
    def _state_parameters(self) -> StateParameters:
        return _of_states(self._masked(self._dense_matrices()))

    def _masked(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: matrix * self.support(name) for name, matrix in matrices.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can be made again, when the model is copied or pickled."""
        return {**self.__dict__, "_compressed": None}


_State = tuple[tuple[int, int, torch.dtype, torch.device], ...]


class _Compressed(NamedTuple):
    """The matrices in the form in which inference multiplies with them."""

    made_of: _State
    A: StateParameters
    B: Tensor
    C: Tensor
    D: Tensor | None


def _for_inference(matrices: Mapping[str, Tensor]) -> bool:
    """Return whether nobody watches the products, and the versions of the parameters are known."""
    derivatives = torch.is_grad_enabled() or transforms_are_active() or forward_ad._current_level >= 0
    watched = derivatives or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    return not watched and not any(matrix.is_inference() for matrix in matrices.values())


def _state_of(matrices: Mapping[str, Tensor]) -> _State:
    """Return what changes when a parameter does."""
    return tuple((m.data_ptr(), m._version, m.dtype, m.device) for m in matrices.values())


def _matrix_names(model: ImplicitModel) -> str:
    return "ABCD" if model.rank is None else "LRBCD"


def _of_states(matrices: Mapping[str, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    """Return ``A``, or its factors."""
    return matrices["A"] if "A" in matrices else (matrices["L"], matrices["R"])


def _buffer(name: str) -> str:
    return f"_{name}_support"


def _settings(model: ImplicitModel) -> dict[str, Any]:
    """Return arguments that build a model of the same shape, with a function of its own."""
    sizes = {name: getattr(model, name) for name in ("hidden_dim", "input_dim", "output_dim")}
    rank = {"low_rank": model.rank is not None, "rank": model.rank}
    return {**sizes, **rank, "f": copy.deepcopy(model.f), "bias": model.bias is not None, "direct": model.D is not None}


def _copy_parameters(source: ImplicitModel, target: _Model) -> _Model:
    for name in (*_matrix_names(source), "bias"):
        if (parameter := getattr(source, name)) is not None:
            setattr(target, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
    return target.train(source.training)
