"""What a constraint on the state matrix is, and the one that allows everything."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from idl.linalg.operators import Dense, Factored, StateMatrix


class AbstractConstraint(ABC):
    """Maps free parameters to an admissible state matrix, by an ordinary function that autograd sees.

    To add a constraint, write a frozen dataclass with :meth:`admit`, and :meth:`admit_factors` if it has a form that
    does not multiply the factors out.

    Example:
        >>> from dataclasses import dataclass
        >>> from idl import ImplicitFunction, ImplicitModel
        >>> @dataclass(frozen=True)
        ... class NonNegative(AbstractConstraint):
        ...     contraction = None
        ...     def admit(self, A, lipschitz):
        ...         return Dense(A.abs())
        >>> model = ImplicitModel(10, 4, 2, f=ImplicitFunction(constraint=NonNegative()))
        >>> bool((model.state_matrix() >= 0).all())
        True
    """

    @property
    @abstractmethod
    def contraction(self) -> float | None:
        r"""A proved factor below 1 by which the map contracts in the max norm; ``None`` if none is proved."""

    @abstractmethod
    def admit(self, A: Tensor, lipschitz: float) -> StateMatrix:
        """Return the admissible matrix of the free ``A``, ``(n, n)``.

        Args:
            A: Free parameter.
            lipschitz: Largest slope of the activation, taken as 1 where it is unknown.
        """

    def admit_factors(self, left: Tensor, right: Tensor, lipschitz: float) -> StateMatrix:
        """Return the admissible matrix of the free factors of ``left right^T``, each ``(n, r)``.

        Args:
            left: Free parameter ``L``.
            right: Free parameter ``R``.
            lipschitz: See :meth:`admit`.

        Raises:
            TypeError: If the constraint has no low-rank form.
        """
        raise TypeError(f"{self!r} has no low-rank form; use low_rank=False, or f=ImplicitFunctionInf.")


@dataclass(frozen=True)
class Free(AbstractConstraint):
    """Every matrix is allowed; that an equilibrium exists and is found is reported, not proved.

    Example:
        >>> import torch
        >>> Free().admit(torch.tensor([[2.0]]), lipschitz=1.0).dense()
        tensor([[2.]])
    """

    contraction = None

    def admit(self, A: Tensor, lipschitz: float) -> StateMatrix:
        """Return ``A`` as it is."""
        return Dense(A)

    def admit_factors(self, left: Tensor, right: Tensor, lipschitz: float) -> StateMatrix:
        """Return the factors as they are."""
        return Factored(left, right)
