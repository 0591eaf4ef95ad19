"""ImplicitRNN and its cell: sequences in which each hidden state comes from an equilibrium."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from idl import checks
from idl.activations import Activation
from idl.functions import ImplicitFunction, ImplicitFunctionInf
from idl.linalg.operators import Factored
from idl.nn.implicit_model import ImplicitModel
from idl.nn.packing import Packing, pack
from idl.recurrence.timeline import Timeline
from idl.sequence import Trajectory
from idl.solvers.base import Solution


class ImplicitRNNCell(nn.Module):
    r"""One step of an implicit RNN: :math:`x = \phi(Ax + B[u; h] + b)`, :math:`h' = Cx + D[u; h]`.

    An :class:`~idl.ImplicitModel` of input and hidden state together, with the call of :class:`torch.nn.RNNCell`. Step
    by step it gives what :class:`ImplicitRNN` gives for the whole sequence.

    Args:
        input_dim: Size of an input ``u``.
        hidden_dim: Size of the hidden state ``h``.
        implicit_hidden_dim: Size of the equilibrium ``x``.
        low_rank, rank, mitr, grad_mitr, tol, grad_tol, f, activation, kappa, bias, direct: See
            :class:`~idl.ImplicitModel`.

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> cell = ImplicitRNNCell(input_dim=3, hidden_dim=8, implicit_hidden_dim=10)
        >>> h = None
        >>> for u in torch.rand(5, 2, 3):
        ...     h = cell(u, h)
        >>> h.shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        implicit_hidden_dim: int,
        low_rank: bool = False,
        rank: int | None = None,
        mitr: int = 300,
        grad_mitr: int = 300,
        tol: float = 3e-6,
        grad_tol: float = 3e-6,
        f: type[ImplicitFunction] | ImplicitFunction = ImplicitFunctionInf,
        *,
        activation: str | Activation | Callable[[Tensor], Tensor] | None = None,
        kappa: float | None = None,
        bias: bool = False,
        direct: bool = True,
    ) -> None:
        super().__init__()
        self.input_dim = checks.positive_integer("input_dim", input_dim)
        self.hidden_dim = checks.positive_integer("hidden_dim", hidden_dim)
        self.implicit_hidden_dim = checks.positive_integer("implicit_hidden_dim", implicit_hidden_dim)
        if low_rank is True and rank is not None and checks.positive_integer("rank", rank) > implicit_hidden_dim:
            raise ValueError(f"`rank` must be at most implicit_hidden_dim={implicit_hidden_dim}; got {rank}.")
        self.model = ImplicitModel(
            self.implicit_hidden_dim,
            self.input_dim + self.hidden_dim,
            self.hidden_dim,
            low_rank=low_rank,
            rank=rank,
            mitr=mitr,
            grad_mitr=grad_mitr,
            tol=tol,
            grad_tol=grad_tol,
            f=f,
            activation=activation,
            kappa=kappa,
            bias=bias,
            direct=direct,
        )
        self._shrink_factors()

    @property
    def f(self) -> ImplicitFunction:
        """The implicit function."""
        return self.model.f

    def reset_parameters(self) -> None:
        """Draw new parameters.

        As :class:`~idl.ImplicitModel` does; but an ``A`` of low rank starts with singular values, not entries, as large
        as those of a full one. In a recurrence its few directions would otherwise feed themselves at every step.
        """
        self.model.reset_parameters()
        self._shrink_factors()

    def forward(
        self,
        u: Float[Tensor, "*batch input"],
        h: Float[Tensor, "*batch hidden"] | None = None,
        x0: Float[Tensor, "*batch n"] | None = None,
        return_solution: bool = False,
    ) -> Any:
        """Return the next hidden state.

        Args:
            u: Inputs of one time, ``(..., input_dim)``.
            h: Hidden state before, ``(..., hidden_dim)``; zeros if ``None``.
            x0: Start of the iteration, as the equilibrium of the time before; changes the steps, not the result.
            return_solution: Whether to return the equilibrium as well, and how exact it is.

        Returns:
            The hidden state ``(..., hidden_dim)``; with ``return_solution`` a pair of it and a
            :class:`~idl.solvers.Solution`.

        Raises:
            TypeError, ValueError: If a shape, dtype or device does not fit.
            ConvergenceError: If a sample did not converge and ``f`` has ``on_failure="raise"``.
        """
        u = checks.dense_tensor("u", u)
        if u.dim() == 0 or u.shape[-1] != self.input_dim:
            raise ValueError(f"`u` must have shape (..., {self.input_dim}); got {tuple(u.shape)}.")
        shape = (*u.shape[:-1], self.hidden_dim)
        if h is None:
            h = u.new_zeros(shape)
        elif checks.floating_tensor("h", h).shape != shape:
            raise ValueError(f"`h` must have shape {shape}, as `u` has {tuple(u.shape)}; got {tuple(h.shape)}.")
        checks.same_device_and_dtype({"u": u, "h": h})
        both = torch.cat((u, h), -1)
        if checks.boolean("return_solution", return_solution):
            return self.model(both, x0, return_solution=True)
        return self.model(both, x0)

    def run(self, rows: Tensor, timeline: Timeline, h0: Tensor, *, parallel_in_time: bool = False) -> Trajectory:
        """Return the equilibria of packed sequences.

        Args:
            rows: Inputs, ``(rows, input_dim)``.
            timeline: Which rows belong to which time.
            h0: Hidden states before the first time, ``(sequences, hidden_dim)``.
            parallel_in_time: See :class:`ImplicitRNN`.
        """
        return self.f.sequence(
            *self.model._matrices(), rows, h0, timeline, bias=self.model.bias, parallel_in_time=parallel_in_time
        )

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the parentheses."""
        return f"{self.input_dim}, {self.hidden_dim}, {self.implicit_hidden_dim}"

    def _shrink_factors(self) -> None:
        if self.model.rank is None or self.model.rank == self.implicit_hidden_dim:
            return
        with torch.no_grad():
            admitted = self.f.state_matrix((self.model.L, self.model.R))
            if isinstance(admitted, Factored):
                self.model.L.copy_(admitted.left * math.sqrt(self.model.rank / self.implicit_hidden_dim))


class ImplicitRNN(nn.Module):
    r"""Predict from a sequence by an implicit model that reads its own last output.

    .. math::
        x_t = \phi(Ax_t + B[u_t; h_{t-1}] + b), \quad h_t = Cx_t + D[u_t; h_{t-1}], \quad \hat y = W h_T + c

    The implicit RNN of Decugis et al. (The Extrapolation Power of Implicit Models, IJCAI 2024), with samples as rows.
    With the default ``f`` every :math:`x_t` exists and is unique. Where ``f`` has an activation with a known
    derivative, and differentiates implicitly, the whole sequence is one node of autograd's, which keeps :math:`x_t`
    and :math:`h_t` and nothing of how they were found; anything else is solved, and recorded, step by step.

    Args:
        input_dim: Size of an input ``u_t``.
        output_dim: Size of a prediction.
        hidden_dim: Size of the hidden state ``h_t``.
        implicit_hidden_dim: Size of the equilibrium ``x_t``.
        low_rank: See :class:`~idl.ImplicitModel`, as for the arguments up to ``f``.
        rank: Number of columns of the factors of ``A``, from 1 to ``implicit_hidden_dim``.
        mitr: Most steps of the forward solve, at each time.
        grad_mitr: Most steps of the backward solve, at each time.
        tol: Absolute tolerance of an equilibrium, largest entry.
        grad_tol: Tolerance of a backward solve, relative to its source.
        f: Implicit function: a class, built with the settings above and below for each cell, or an instance.
        activation: Name, :class:`~idl.activations.Activation` or callable; ``None`` means ReLU, or what ``f`` defines.
        kappa: Bound on :math:`\|A\|_\infty`, in (0, 1); ``None`` means 0.99, that of ``ImplicitFunctionInf``.
        bias: Whether to add a constant ``b`` to the pre-activation.
        direct: Whether the term with ``D`` is there.
        num_layers: Number of layers, each of which reads the hidden states of the one below.
        bidirectional: Whether a second cell a layer reads the sequence from its end.
        batch_first: Whether padded sequences are ``(batch, time, ...)``; else ``(time, batch, ...)``.
        return_sequence: Whether to predict at each time; else from the last hidden state (of each direction).
        parallel_in_time: Whether to solve all times together, by Newton's method and a scan, instead of one after
            another. The same result to the tolerance where equilibria are unique; sooner for long sequences of small
            states in small batches, see the measured table in the documentation. Needs ``O(T h^2)`` memory a sequence.
            A sequence on which it does not converge in 16 Newton steps, or in ``mitr`` steps of all equilibria
            of a time together, is solved as without it, and so is an ``f`` that is solved step by step.

    Raises:
        TypeError, ValueError: If an argument is out of range.

    Example:
        >>> model = ImplicitRNN(input_dim=3, output_dim=2, hidden_dim=8, implicit_hidden_dim=10)
        >>> model(torch.rand(4, 7, 3)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        hidden_dim: int,
        implicit_hidden_dim: int,
        low_rank: bool = False,
        rank: int | None = None,
        mitr: int = 300,
        grad_mitr: int = 300,
        tol: float = 3e-6,
        grad_tol: float = 3e-6,
        f: type[ImplicitFunction] | ImplicitFunction = ImplicitFunctionInf,
        *,
        activation: str | Activation | Callable[[Tensor], Tensor] | None = None,
        kappa: float | None = None,
        bias: bool = False,
        direct: bool = True,
        num_layers: int = 1,
        bidirectional: bool = False,
        batch_first: bool = True,
        return_sequence: bool = False,
        parallel_in_time: bool = False,
    ) -> None:
        super().__init__()
        self.input_dim = checks.positive_integer("input_dim", input_dim)
        self.output_dim = checks.positive_integer("output_dim", output_dim)
        self.hidden_dim = checks.positive_integer("hidden_dim", hidden_dim)
        self.implicit_hidden_dim = checks.positive_integer("implicit_hidden_dim", implicit_hidden_dim)
        self.num_layers = checks.positive_integer("num_layers", num_layers)
        self.bidirectional = checks.boolean("bidirectional", bidirectional)
        self.batch_first = checks.boolean("batch_first", batch_first)
        self.return_sequence = checks.boolean("return_sequence", return_sequence)
        self.parallel_in_time = checks.boolean("parallel_in_time", parallel_in_time)
        directions = 2 if self.bidirectional else 1
        self.cells = nn.ModuleList(
            ImplicitRNNCell(
                self.input_dim if layer == 0 else directions * self.hidden_dim,
                self.hidden_dim,
                self.implicit_hidden_dim,
                low_rank=low_rank,
                rank=rank,
                mitr=mitr,
                grad_mitr=grad_mitr,
                tol=tol,
                grad_tol=grad_tol,
                f=f,
                activation=activation,
                kappa=kappa,
                bias=bias,
                direct=direct,
            )
            for layer in range(self.num_layers)
            for _ in range(directions)
        )
        self.readout = nn.Linear(directions * self.hidden_dim, self.output_dim)

    def reset_parameters(self) -> None:
        """Draw new parameters: as :class:`ImplicitRNNCell` and :class:`torch.nn.Linear` do."""
        for module in (*self.cells, self.readout):
            module.reset_parameters()

    def forward(
        self,
        u: Float[Tensor, "..."] | PackedSequence,
        h0: Float[Tensor, "..."] | None = None,
        lengths: Any = None,
        *,
        return_state: bool = False,
        return_solution: bool = False,
    ) -> Any:
        """Predict from sequences ``(batch, time, input_dim)``, from one ``(time, input_dim)``, or from packed ones.

        Args:
            u: Inputs.
            h0: Hidden state before the first time, ``(layers * directions, batch, hidden_dim)`` as in
                :class:`torch.nn.RNN`; zeros if ``None``.
            lengths: Number of times of each sequence, integers ``(batch,)``; what lies beyond is not looked at.
            return_state: Whether to return the last hidden state ``h_n`` as well, of the shape of ``h0``.
            return_solution: Whether to return the equilibria as well, and how exact they are.

        Returns:
            Predictions ``(batch, output_dim)``. With ``return_sequence`` those of each time, in the form of ``u``: a
            tensor, zero beyond the length of a sequence, or a ``PackedSequence``.

            With ``return_state`` or ``return_solution`` a tuple of these, the state, and a
            :class:`~idl.solvers.Solution` with one number for each cell, sample and time, ``(layers * directions,
            batch, time)`` or, as ``u`` has them, ``(..., time, batch)`` or ``(..., time)``; as converged as can be
            beyond the length of a sequence. Its error bound is that of
            ``x_t`` for the ``h_{t-1}`` that was computed, which itself is as exact as the tolerance asks.

        Raises:
            TypeError, ValueError: If a shape, dtype, device or length does not fit.
            ConvergenceError: If a state did not converge and ``f`` has ``on_failure="raise"``.
        """
        checks.boolean("return_state", return_state)
        checks.boolean("return_solution", return_solution)
        rows, packing = pack(u, lengths, self.input_dim, self.batch_first)
        states = self._first_states(h0, rows, packing)
        directions = 2 if self.bidirectional else 1
        timelines = [Timeline(packing.sizes), Timeline(packing.sizes, backwards=True)][:directions]
        runs: list[Trajectory] = []
        for first in range(0, len(self.cells), directions):
            if first:
                rows = torch.cat([run.h for run in runs[-directions:]], 1)
            for i, timeline in enumerate(timelines, first):
                run = self._cell(i).run(rows, timeline, states[i], parallel_in_time=self.parallel_in_time)
                runs.append(run)
        top = runs[-directions:]
        if self.return_sequence:
            prediction = packing.like_the_input(self.readout(torch.cat([run.h for run in top], 1)))
        else:
            prediction = packing.unsorted(self.readout(torch.cat([run.last for run in top], 1)))
        extras: list[Any] = []
        if return_state:
            extras.append(packing.unsorted(torch.stack([run.last for run in runs])))
        if return_solution:
            extras.append(self._solution(runs, packing))
        return (prediction, *extras) if extras else prediction

    def extra_repr(self) -> str:
        """Return what ``repr`` shows between the parentheses."""
        sizes = f"{self.input_dim}, {self.output_dim}, {self.hidden_dim}, {self.implicit_hidden_dim}"
        flags = f"bidirectional={self.bidirectional}, batch_first={self.batch_first}"
        times = f"return_sequence={self.return_sequence}, parallel_in_time={self.parallel_in_time}"
        return f"{sizes}, num_layers={self.num_layers}, {flags}, {times}"

    def _cell(self, i: int) -> ImplicitRNNCell:
        return cast(ImplicitRNNCell, self.cells[i])

    def _first_states(self, h0: Tensor | None, rows: Tensor, packing: Packing) -> Tensor:
        shape = (
            (len(self.cells), packing.batch, self.hidden_dim) if packing.batched else (len(self.cells), self.hidden_dim)
        )
        if h0 is None:
            return rows.new_zeros(len(self.cells), packing.batch, self.hidden_dim)
        if checks.floating_tensor("h0", h0).shape != shape:
            names = (
                "(layers * directions, batch, hidden_dim)" if packing.batched else "(layers * directions, hidden_dim)"
            )
            raise ValueError(f"`h0` must have shape {shape}, that is {names}; got {tuple(h0.shape)}.")
        checks.same_device_and_dtype({"u": rows, "h0": h0})
        return packing.sorted(h0)

    def _solution(self, runs: list[Trajectory], packing: Packing) -> Solution:
        def padded(values: list[Tensor]) -> Tensor:
            return torch.stack([packing.padded(value) for value in values])

        residual = padded([run.residual() for run in runs])
        converged = padded([run.converged.logical_not() for run in runs]).logical_not()  # nothing failed in a padding
        kappa = self._cell(0).f.contraction if all(run.exact for run in runs) else None
        bound = None if kappa is None else residual / (1 - kappa)
        return Solution(
            padded([run.x for run in runs]), residual, padded([run.steps for run in runs]), converged, bound
        )
