"""Activations: phi, its derivative and a bound on its slope; no model and no solver."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from idl import checks


@dataclass(frozen=True)
class Activation:
    r"""A componentwise activation :math:`\phi` with what a solver can use of it.

    Args:
        phi: The function, applied to a tensor of any shape, entry by entry.
        derivative: :math:`\phi'` at the pre-activation ``z``, differentiable by autograd; without it
            derivatives come from autograd, and ``phi`` may then also couple the entries of a sample.
        lipschitz: The largest slope, a positive number without a gradient; ``None`` if unknown. Above 1 a constraint of
            radius ``kappa`` allows row sums up to ``kappa / lipschitz``, so that the whole map contracts with factor
            ``kappa``. Together with ``derivative``, by which residuals are measured in float64, it gives error bounds.
        derivative_of_output: :math:`\phi'(z)` written as a function of ``phi(z)``; saves the backward a product.
        phi_: ``phi`` in place; then ``phi`` itself must leave its argument as it is.
        name: What ``repr`` shows.

    Raises:
        TypeError, ValueError: If ``phi`` is no function, or ``lipschitz`` no positive number.

    Example:
        >>> from idl import ImplicitModel
        >>> sine = Activation(torch.sin, torch.cos, lipschitz=1.0, name="sin")
        >>> ImplicitModel(100, 64, 10, activation=sine).f.activation
        sin
    """

    phi: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor] | None = None
    lipschitz: float | None = None
    derivative_of_output: Callable[[Tensor], Tensor] | None = None
    phi_: Callable[[Tensor], Tensor] | None = None
    name: str = "custom"

    def __post_init__(self) -> None:
        for field in ("phi", "derivative", "derivative_of_output", "phi_"):
            value = getattr(self, field)
            if value is None and field != "phi":
                continue
            if isinstance(value, type) or not callable(value):
                raise TypeError(f"`{field}` must be a function of a tensor; got {value!r}. Try torch.tanh.")
        if self.lipschitz is not None:
            checks.positive("lipschitz", self.lipschitz)

    def __call__(self, z: Tensor) -> Tensor:
        """Return ``phi(z)``, and leave ``z`` as it is."""
        # A callable may work in place, as nn.ReLU(inplace=True) does; one that has an in-place form beside it does not.
        return self.phi(z if self.phi_ is not None else z.clone())

    def slope(self, z: Tensor) -> Tensor:
        """Return the derivative at ``z``.

        Raises:
            TypeError: If it is not known.
        """
        if self.derivative is None:
            raise TypeError(f"{self!r} has no known derivative; autograd differentiates it.")
        return self.derivative(z)

    def __repr__(self) -> str:
        return self.name

    def apply_(self, z: Tensor) -> Tensor:
        """Overwrite ``z`` with ``phi(z)`` and return it."""
        return z.copy_(self.phi(z)) if self.phi_ is None else self.phi_(z)


def _relu_slope(z: Tensor) -> Tensor:
    return torch.relu(torch.sign(z))  # a comparison and its conversion take five times as long


def _relu_slope_of_output(x: Tensor) -> Tensor:
    return torch.sign(x)  # outputs are not negative


LEAK = 0.01  # torch's default negative slope


def _leaky_slope(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1.0, LEAK).to(x.dtype)


def _leaky_relu(z: Tensor) -> Tensor:
    return F.leaky_relu(z, LEAK)


def _leaky_relu_(z: Tensor) -> Tensor:
    return F.leaky_relu_(z, LEAK)


def _tanh_slope(z: Tensor) -> Tensor:
    return 1 - torch.tanh(z).square()


def _tanh_slope_of_output(x: Tensor) -> Tensor:
    return 1 - x.square()


def _sigmoid_slope(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z)


def _sigmoid_slope_of_output(x: Tensor) -> Tensor:
    return x * (1 - x)


def _softplus(z: Tensor) -> Tensor:
    return torch.logaddexp(z, torch.zeros_like(z))  # torch's softplus turns linear at 20, which bends derivatives


def _softplus_slope_of_output(x: Tensor) -> Tensor:
    return -torch.expm1(-x)


def _silu_slope(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _identity(z: Tensor) -> Tensor:
    return z


relu = Activation(torch.relu, _relu_slope, 1.0, _relu_slope_of_output, torch.relu_, "relu")
leaky_relu = Activation(_leaky_relu, _leaky_slope, 1.0, _leaky_slope, _leaky_relu_, "leaky_relu")
tanh = Activation(torch.tanh, _tanh_slope, 1.0, _tanh_slope_of_output, torch.tanh_, "tanh")
sigmoid = Activation(torch.sigmoid, _sigmoid_slope, 0.25, _sigmoid_slope_of_output, torch.sigmoid_, "sigmoid")
softplus = Activation(_softplus, torch.sigmoid, 1.0, _softplus_slope_of_output, None, "softplus")
# max of sigma(z)(1 + z(1 - sigma(z))) is 1.09983942... at z = 2.39936; rounded up.
silu = Activation(F.silu, _silu_slope, 1.0998395, None, None, "silu")
identity = Activation(_identity, torch.ones_like, 1.0, torch.ones_like, _identity, "identity")

BY_NAME: dict[str, Activation] = {a.name: a for a in (relu, leaky_relu, tanh, sigmoid, softplus, silu, identity)}


@dataclass(frozen=True)
class _ComponentwiseDerivative:
    """A class and not a closure, so that a model with it can be pickled."""

    phi: Callable[[Tensor], Tensor]

    def __call__(self, z: Tensor) -> Tensor:
        _, pull, *_ = torch.func.vjp(lambda z: self.phi(z.clone()), z)
        return pull(torch.ones_like(z))[0]


def componentwise(activation: Activation) -> Activation:
    """Return ``activation`` with its derivative from autograd, for one that acts on each entry by itself.

    Raises:
        ValueError: If an entry of its result depends on another entry than its own.

    Example:
        >>> square = componentwise(Activation(torch.square))
        >>> square.slope(torch.tensor([1.0, 3.0]))
        tensor([2., 6.])
    """
    z = torch.linspace(-1.3, 1.7, 5)
    moved = torch.cat((z[:-1], z[-1:] + 0.25))
    try:
        separate = torch.equal(activation(z[None])[0, :-1], activation(moved[None])[0, :-1])
    except RuntimeError:  # made for states of another size: cannot be looked at here
        separate = True
    if not separate:
        raise ValueError(
            f"`activation` must act on each entry by itself in a triangular model; got {activation!r}, which couples "
            "them. Use ImplicitFunctionInf."
        )
    return replace(activation, derivative=_ComponentwiseDerivative(activation.phi))


def resolve(activation: str | Activation | Callable[[Tensor], Tensor], name: str = "activation") -> Activation:
    """Return the activation of a name, of an :class:`Activation`, or of any callable on tensors.

    Errors call it ``name``.

    A callable carries no derivative and no slope bound: gradients come from autograd (also those of its own
    parameters, and also where it couples the entries of a sample), and no error bound is claimed.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If ``activation`` is neither a string nor callable.

    Example:
        >>> resolve("tanh").lipschitz
        1.0
    """
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        if activation not in BY_NAME:
            raise ValueError(
                f"`{name}` must be one of {', '.join(map(repr, BY_NAME))}, an Activation or a callable; "
                f"got {activation!r}."
            )
        return BY_NAME[activation]
    if isinstance(activation, type):
        raise TypeError(
            f"`{name}` must be a name, an Activation or a callable on tensors; got the class "
            f"{activation.__name__}. Did you mean {activation.__name__}()?"
        )
    if callable(activation):
        return Activation(activation, name=getattr(activation, "__name__", type(activation).__name__))
    raise TypeError(
        f"`{name}` must be a name, an Activation or a callable on tensors; got {type(activation).__name__}."
    )
