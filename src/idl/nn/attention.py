"""IDLHead and IDLAttention: self-attention whose keys, queries and values depend on what they give."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from idl import checks
from idl.attention.equilibrium import Past
from idl.differentiation.base import OnFailure
from idl.nn.implicit_heads import Gradient, ImplicitHeads, Version, constants
from idl.solvers.base import AbstractFixedPointSolver


class IDLHead(ImplicitHeads):
    r"""One head of implicit self-attention: what a token gives decides what it asks, and what others read of it.

    .. math:: [k\; q\; v] = A\,[k\; q\; v\; o] + Bu + b, \quad o = \mathrm{attention}(q, k, v)

    for all tokens together, causal by default; the output is ``o``. With ``A = 0`` it is an explicit head. Keys,
    queries and values are eliminated exactly: an equation in ``o`` alone is solved, and a step costs about what an
    explicit head costs. The gradient is that of the equilibrium, and memory does not grow with the steps.

    ``||A||_inf <= kappa < 1`` makes the elimination possible, and proves nothing about attention itself: softmax is not
    Lipschitz, so that a solve is watched and not promised; a warning says when it failed. The Lipschitz form comes with
    a computed bound, :meth:`contraction_bound`, and with ``contractive=True`` it is held below 1.

    Args:
        head_size: Size of keys, queries, values and output of a token.
        n_embd: Size of an input token.
        block_size: Most tokens; ``None`` for any number.
        fixed_point_iter: Most steps of the solve; the tolerance ends it earlier.
        attention_version: ``"softmax"``, or ``"lipschitz"`` (see :class:`~idl.attention.forms.LipschitzAttention`).
        is_low_rank: Whether ``A`` is a product of two factors of ``rank`` columns.
        rank: Number of columns, from 1 to ``3 head_size``; without a meaning otherwise.
        tol: Absolute tolerance of an output, largest entry.
        grad_tol: Tolerance of the backward solve, relative to its source.
        kappa: Bound on the largest row sum of ``|A|``, in (0, 1).
        causal: Whether a token reads only itself and those before it.
        bias: Whether keys, queries and values have a constant ``b``.
        dropout: Probability of dropping a weight in training, in [0, 1]: one draw for all steps of a call, or the
            equilibrium would not be one. Forms the ``(time, time)`` matrices.
        solver: Method of the solve instead of :class:`~idl.solvers.Adaptive`; has its own ``tol`` and steps.
        gradient: ``"implicit"``; ``"unrolled"``, which records all ``fixed_point_iter`` steps; or ``"phantom"``, which
            records the last five.
        contractive: Whether to scale what outputs add so that the proved bound on the contraction is at most ``kappa``.
        on_failure: What to do if a sequence does not converge: ``"raise"``, ``"warn"`` or ``"ignore"``.

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> head = IDLHead(8, 32, 16, 30, "softmax")
        >>> head(torch.randn(2, 16, 32)).shape
        torch.Size([2, 16, 8])
    """

    def __init__(
        self,
        head_size: int,
        n_embd: int,
        block_size: int | None,
        fixed_point_iter: int = 100,
        attention_version: Version = "softmax",
        is_low_rank: bool = False,
        rank: int = 1,
        *,
        tol: float = 3e-6,
        grad_tol: float = 3e-6,
        kappa: float = 0.95,
        causal: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
        solver: AbstractFixedPointSolver | None = None,
        gradient: Gradient = "implicit",
        contractive: bool = False,
        on_failure: OnFailure = "warn",
    ) -> None:
        super().__init__(
            (),
            head_size,
            n_embd,
            block_size,
            fixed_point_iter,
            attention_version,
            is_low_rank,
            rank,
            tol=tol,
            grad_tol=grad_tol,
            kappa=kappa,
            causal=causal,
            bias=bias,
            dropout=dropout,
            solver=solver,
            gradient=gradient,
            contractive=contractive,
            on_failure=on_failure,
        )

    @classmethod
    def from_explicit(
        cls,
        key: nn.Linear,
        query: nn.Linear,
        value: nn.Linear,
        block_size: int | None = None,
        fixed_point_iter: int = 100,
        attention_version: Version = "softmax",
        **options: Any,
    ) -> "IDLHead":
        """Return a head that starts exactly at an explicit one: ``A = 0``, which training then moves.

        Args:
            key: Map from a token to its key.
            query: Map from a token to its query.
            value: Map from a token to its value.
            block_size: As in the constructor, and so what follows.
            fixed_point_iter: Most steps.
            attention_version: With ``"lipschitz"`` the start is Lipschitz attention of the same keys and queries.
            options: Other arguments of the constructor by name.

        Raises:
            TypeError, ValueError: If the three do not fit together, or an argument is out of range.
        """
        maps = _explicit({"key": key, "query": query, "value": value})
        check_options(cls, options)
        options.setdefault("bias", any(linear.bias is not None for linear in maps))
        head = cls(key.out_features, key.in_features, block_size, fixed_point_iter, attention_version, **options)
        head = head.to(key.weight)
        head.start_at(*maps)
        return head

    def forward(
        self,
        u: Float[Tensor, "batch time n_embd"],
        key_padding_mask: Bool[Tensor, "batch keys"] | None = None,
        *,
        past: Past | None = None,
        return_past: bool = False,
        return_solution: bool = False,
    ) -> Any:
        """Return the outputs of the head, ``(batch, time, head_size)``.

        Args:
            u: Tokens.
            key_padding_mask: True where a token is padding, and is not read by any; the tokens of ``past`` first.
            past: Keys and values of the tokens before ``u``, as ``return_past`` gives them: causal attention does not
                change an equilibrium that has been found. Carries a gradient if it has one.
            return_past: Whether to return keys and values of all tokens up to now as well.
            return_solution: Whether to return how exact the equilibrium is as well.

        Returns:
            The outputs; with ``return_past`` or ``return_solution`` a tuple of them, two tensors ``(batch, 1, tokens,
            head_size)``, and a :class:`~idl.solvers.Solution` with one residual and number of steps a sequence. In half
            precision these are of the solve in float32, before the outputs are rounded.

        Raises:
            TypeError, ValueError: If a shape, dtype or device does not fit, or there are too many tokens.
            ConvergenceError: If a sequence did not converge and ``on_failure="raise"``.
        """
        o, extras = self.outputs(
            u, key_padding_mask, past=past, return_past=return_past, return_solution=return_solution
        )
        output = o[:, :, 0]
        return (output, *extras) if extras else output


class IDLAttention(ImplicitHeads):
    """Implicit self-attention of several heads in one computation, with the projection of their outputs.

    Each head is an :class:`IDLHead`; all are solved together.

    Args:
        n_embd: Size of a token.
        n_head: Number of heads.
        block_size: Most tokens; ``None`` for any number.
        head_size: Size of a head; ``n_embd / n_head`` if ``None``.
        fixed_point_iter: See :class:`IDLHead`, as for all that follow.
        attention_version: See there.
        is_low_rank: See there.
        rank: See there.
        tol: See there.
        grad_tol: See there.
        kappa: See there.
        causal: See there.
        bias: Whether keys, queries, values, and the projection have constants.
        dropout: See there.
        solver: See there.
        gradient: See there.
        contractive: See there.
        on_failure: See there.

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> attention = IDLAttention(32, 4, block_size=16)
        >>> attention(torch.randn(2, 16, 32)).shape
        torch.Size([2, 16, 32])
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        block_size: int | None,
        fixed_point_iter: int = 100,
        attention_version: Version = "softmax",
        is_low_rank: bool = False,
        rank: int = 1,
        *,
        head_size: int | None = None,
        tol: float = 3e-6,
        grad_tol: float = 3e-6,
        kappa: float = 0.95,
        causal: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
        solver: AbstractFixedPointSolver | None = None,
        gradient: Gradient = "implicit",
        contractive: bool = False,
        on_failure: OnFailure = "warn",
    ) -> None:
        n_embd, n_head = checks.positive_integer("n_embd", n_embd), checks.positive_integer("n_head", n_head)
        if head_size is None:
            if n_embd % n_head:
                raise ValueError(f"`n_head` must divide n_embd={n_embd} unless head_size is given; got {n_head}.")
            head_size = n_embd // n_head
        super().__init__(
            (n_head,),
            head_size,
            n_embd,
            block_size,
            fixed_point_iter,
            attention_version,
            is_low_rank,
            rank,
            tol=tol,
            grad_tol=grad_tol,
            kappa=kappa,
            causal=causal,
            bias=bias,
            dropout=dropout,
            solver=solver,
            gradient=gradient,
            contractive=contractive,
            on_failure=on_failure,
        )
        self.n_head = n_head
        self.projection: nn.Module = nn.Linear(self.n_head * self.head_size, self.n_embd, bias=bias)

    @classmethod
    def from_explicit(
        cls,
        key: nn.Linear,
        query: nn.Linear,
        value: nn.Linear,
        projection: nn.Linear,
        n_head: int,
        block_size: int | None = None,
        fixed_point_iter: int = 100,
        attention_version: Version = "softmax",
        **options: Any,
    ) -> "IDLAttention":
        """Return implicit attention that starts exactly at an explicit one: ``A = 0``, which training then moves.

        Args:
            key: Map from a token to the keys of all heads, one after another.
            query: Map to the queries.
            value: Map to the values.
            projection: Map of the outputs of all heads; copied.
            n_head: Number of heads.
            block_size: As in the constructor, and so what follows.
            fixed_point_iter: Most steps.
            attention_version: With ``"lipschitz"`` the start is Lipschitz attention of the same keys and queries.
            options: Other arguments of the constructor by name.

        Raises:
            TypeError, ValueError: If the maps do not fit together, or an argument is out of range.
        """
        maps = _explicit({"key": key, "query": query, "value": value})
        check_options(cls, options)
        width, n_head = key.out_features, checks.positive_integer("n_head", n_head)
        checks.instance("projection", projection, nn.Linear, "Pass the module that projects the heads' outputs.")
        if width % n_head or projection.in_features != width or projection.out_features != key.in_features:
            raise ValueError(
                f"`projection` must map {width} to {key.in_features}, and n_head divide {width}; got "
                f"{projection.in_features} to {projection.out_features}, and {n_head} heads."
            )
        biased = any(linear.bias is not None for linear in (*maps, projection))
        if not options.setdefault("bias", biased) and biased:
            raise ValueError("`bias` must be True for explicit maps with biases; got False. Leave it out: it is found.")
        settings = (block_size, fixed_point_iter, attention_version)
        attention = cls(key.in_features, n_head, *settings, head_size=width // n_head, **options)
        attention = attention.to(key.weight)
        attention.start_at(*maps)
        taken = nn.Linear(width, key.in_features, bias=attention.bias is not None).to(key.weight)
        with torch.no_grad():
            taken.weight.copy_(projection.weight)
            if attention.bias is not None:
                taken.bias.copy_(constants(projection))
        attention.projection = taken.requires_grad_(projection.weight.requires_grad)
        return attention

    def forward(
        self,
        u: Float[Tensor, "batch time n_embd"],
        key_padding_mask: Bool[Tensor, "batch keys"] | None = None,
        *,
        past: Past | None = None,
        return_past: bool = False,
        return_solution: bool = False,
    ) -> Any:
        """Return the projected outputs of all heads, ``(batch, time, n_embd)``; see :meth:`IDLHead.forward`.

        Args:
            u: Tokens.
            key_padding_mask: True where a token is padding.
            past: Keys and values of the tokens before, ``(batch, heads, tokens, head_size)`` each.
            return_past: Whether to return those of all tokens up to now as well.
            return_solution: Whether to return how exact the equilibrium is as well.

        Returns:
            The outputs, or a tuple as :meth:`IDLHead.forward` gives it.

        Raises:
            TypeError, ValueError: If a shape, dtype or device does not fit, or there are too many tokens.
            ConvergenceError: If a sequence did not converge and ``on_failure="raise"``.
        """
        o, extras = self.outputs(
            u, key_padding_mask, past=past, return_past=return_past, return_solution=return_solution
        )
        output = self.projection(o.flatten(2))
        return (output, *extras) if extras else output


_OF_THE_MODEL = {"n_embd", "n_head", "head_size", "block_size", "fixed_point_iter", "attention_version"}


def check_options(kind: type, options: Iterable[str]) -> None:
    """Check that all are arguments of a constructor that are not given elsewhere, or follow from explicit maps."""
    known = inspect.signature(kind).parameters.keys() - _OF_THE_MODEL
    if unknown := sorted(set(options) - known):
        raise TypeError(
            f"`options` must be of {', '.join(sorted(known))}; got {', '.join(unknown)}. Sizes are those of the maps."
        )


def _explicit(maps: dict[str, nn.Linear]) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Return the maps of an explicit head if they fit together."""
    key, query, value = (
        checks.instance(name, linear, nn.Linear, "Pass the modules that map a token to key, query and value.")
        for name, linear in maps.items()
    )
    checks.same_device_and_dtype({name: linear.weight for name, linear in maps.items()})
    if not key.weight.shape == query.weight.shape == value.weight.shape:
        shapes = ", ".join(str(tuple(linear.weight.shape)) for linear in maps.values())
        raise ValueError(f"`key`, `query` and `value` must have weights of one shape; got {shapes}.")
    return key, query, value
