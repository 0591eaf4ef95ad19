"""A feed-forward teacher seen as an implicit model: its activations are watched, or replaced, while it runs."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, resolve_name

from idl import activations
from idl.activations import Activation
from idl.errors import CaptureError

_ACTIVATIONS: dict[Callable[..., Any], str] = {
    function: name
    for name, functions in {
        "relu": (torch.relu, torch.relu_, F.relu, F.relu_, Tensor.relu, Tensor.relu_),
        "leaky_relu": (F.leaky_relu, F.leaky_relu_),
        "tanh": (torch.tanh, torch.tanh_, F.tanh, Tensor.tanh, Tensor.tanh_),
        "sigmoid": (torch.sigmoid, torch.sigmoid_, F.sigmoid, Tensor.sigmoid, Tensor.sigmoid_),
        "softplus": (F.softplus,),
        "silu": (F.silu,),
    }.items()
    for function in functions
}
_DEFAULTS = {"leaky_relu": (activations.LEAK,), "softplus": (1.0, 20.0)}
_PROBE_TOLERANCE = 1e-3  # of float32 sums of thousands of terms; what is not affine misses by far more


class Recording(NamedTuple):
    """What one batch shows: samples as rows, all in the dtype of the teacher."""

    U: Tensor
    """Inputs, ``(batch, p)``."""
    Z: Tensor
    """Pre-activations of all layers, last layer first, ``(batch, n)``."""
    X: Tensor
    """Post-activations, in the same order."""
    Y: Tensor
    """Outputs, ``(batch, q)``."""


class Matrices(NamedTuple):
    """The teacher as an implicit model, exactly: ``Z = X A^T + U B^T + b``, ``Y = X C^T + U D^T + d``."""

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    b: Tensor
    d: Tensor


@dataclass(frozen=True)
class Layer:
    """One activation of a teacher: its name, and the shape of its units for one sample."""

    name: str
    shape: tuple[int, ...]

    @property
    def units(self) -> int:
        """Number of units."""
        return torch.Size(self.shape).numel()


class Teacher:
    """A teacher whose activations can be recorded and replaced.

    Between two activations a teacher may do whatever is affine in its activations and inputs, sample by sample.

    Args:
        module: The teacher; it is run in ``eval`` mode, without gradients, and is left as it was.
        example: A batch of inputs.
        layers: Names of the activations that become states, as the error of an unknown name lists them; all if
            ``None``.

    Raises:
        CaptureError: If an operation of the teacher has no place in an implicit model; the message names it.
        ValueError: If a name in ``layers`` is unknown, or the teacher fails on ``example``.
    """

    def __init__(self, module: nn.Module, example: Tensor, layers: Sequence[str] | None = None) -> None:
        self.module = module
        watch = _Watch()
        with _running(module, watch):
            try:
                output = module(example.clone())
            except (CaptureError, torch.cuda.OutOfMemoryError):
                raise
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise ValueError(_failure(module, example, error)) from error
        _outputs(output, len(example))
        if not watch.seen:
            known = ", ".join(sorted(set(_ACTIVATIONS.values())))
            raise CaptureError(
                f"the teacher uses none of the activations {known}; operations seen: {watch.operations}."
            )
        kinds = sorted({kind for kind, _, _ in watch.seen})
        if len(kinds) > 1:
            raise CaptureError(
                f"the teacher mixes the activations {' and '.join(kinds)}; an implicit model has one. "
                f"Use one, or fit the part of the teacher that does."
            )
        self.activation: Activation = activations.BY_NAME[kinds[0]]
        names = _unique([name for _, name, _ in watch.seen])
        shapes = [z.shape for _, _, z in watch.seen]
        for name, shape in zip(names, shapes, strict=True):
            if shape[:1] != example.shape[:1]:
                raise CaptureError(f"layer {name!r} has shape {tuple(shape)}: its first dimension must be the batch.")
        chosen = names if layers is None else list(layers)
        unknown = [name for name in chosen if name not in names]
        if unknown or not chosen:
            raise ValueError(f"`layers` must be names among {names}; got {unknown or chosen}.")
        self.kept = [name in chosen for name in names]
        self.layers = tuple(Layer(n, tuple(s[1:])) for n, s, keep in zip(names, shapes, self.kept, strict=True) if keep)
        self.all_layers = tuple(Layer(n, tuple(s[1:])) for n, s in zip(names, shapes, strict=True))
        self.input_shape, self.dtype = tuple(example.shape[1:]), example.dtype
        self.operations = watch.operations
        self._check_affine(example)

    @property
    def weights(self) -> int:
        """Number of weights of the teacher itself: all its parameters but biases and other vectors."""
        return sum(p.numel() for p in self.module.parameters() if p.dim() > 1)

    def record(self, u: Tensor) -> Recording:
        """Run the teacher on a batch and return what it shows."""
        watch = _Watch()
        with _running(self.module, watch):
            y = self.module(u.clone())
        states = [z.flatten(1) for (_, _, z), keep in zip(watch.seen, self.kept, strict=True) if keep]
        Z = torch.cat(states[::-1], 1)
        return Recording(u.flatten(1), Z, self.activation(Z), _outputs(y, len(u)))

    def matrices(self, chunk: int = 1024) -> Matrices:
        """Return the matrices of the whole teacher, all layers, by running it on unit vectors in place of its states.

        The teacher runs ``n + p + 1`` samples, ``chunk`` at a time.
        """
        n, p = sum(layer.units for layer in self.all_layers), torch.Size(self.input_shape).numel()
        b, d = self._respond(torch.zeros(1, n, dtype=self.dtype), torch.zeros(1, p, dtype=self.dtype))
        columns = []
        for start in range(0, n + p, chunk):
            rows = torch.arange(start, min(start + chunk, n + p))
            unit = F.one_hot(rows, n + p).to(self.dtype)
            z, y = self._respond(unit[:, :n], unit[:, n:])
            columns.append(torch.cat((z - b, y - d), 1).double())
        whole = torch.cat(columns).T
        return Matrices(whole[:n, :n], whole[:n, n:], whole[n:, :n], whole[n:, n:], b[0].double(), d[0].double())

    def _respond(self, X: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
        """Return pre-activations and outputs when the states of all layers are ``X``, last layer first."""
        device = next((p.device for p in self.module.parameters()), X.device)
        parts = torch.split(X.to(device), [layer.units for layer in self.all_layers[::-1]], 1)[::-1]
        shaped = [part.reshape(-1, *layer.shape) for part, layer in zip(parts, self.all_layers, strict=True)]
        watch = _Watch(replacements=shaped)
        with _running(self.module, watch):
            y = self.module(U.to(device).reshape(-1, *self.input_shape).clone())
        return torch.cat([z.flatten(1) for _, _, z in watch.seen[::-1]], 1).cpu(), _outputs(y, len(U)).cpu()

    def _check_affine(self, example: Tensor) -> None:
        """Check ``f(a) + f(b) = f(a + b) + f(0)`` between the activations, near zero and on the scale of the data.

        Also that samples are answered alike in batches of other sizes.
        """
        generator = torch.Generator().manual_seed(0)
        recording = self.record(example)
        states = recording.X[:1] if all(self.kept) else torch.ones(1, sum(layer.units for layer in self.all_layers))
        data = torch.cat((states.cpu().to(self.dtype), recording.U[:1].cpu()), 1)
        data = torch.where(data.isfinite(), data, 0)  # whoever reads the data says what is wrong with it
        n = states.shape[1]
        tolerance = _PROBE_TOLERANCE if self.dtype in (torch.float32, torch.float64) else 0.05
        rounding = 64 * torch.finfo(self.dtype).eps
        largest = float(data.abs().amax().clamp_min(1))
        for scale in (1.0, largest, 1.0, 100 * largest, 1.0, 1.0, 1.0, 1.0):  # several, for gates of the input's sign
            drawn = (scale * torch.randn(2, data.shape[1], generator=generator)).to(self.dtype)
            a, b, zero = data if scale == largest else drawn[:1], drawn[1:], torch.zeros_like(drawn[:1])
            points = torch.cat((a, b, a + b, zero))
            values = torch.cat(self._respond(points[:, :n], points[:, n:]), 1).double()
            fewer = torch.cat(self._respond(points[1:3, :n], points[1:3, n:]), 1).double()
            sizes = values.abs().amax(0)
            if not bool(values[3].isfinite().all()):
                raise CaptureError(
                    "the teacher gives NaN or inf where its input and its states are zero, so that it is not affine "
                    f"between its activations; {self._suspects()}. A quotient by something computed is not."
                )
            if not bool(sizes.isfinite().all()):  # too large for the dtype, which says nothing of the operations
                continue
            # Where large terms cancel, their rounding is all that is left.
            allowed = tolerance * sizes + rounding * sizes.amax()
            defect = (values[0] + values[1] - values[2] - values[3]).abs()
            if not bool((defect <= allowed).all()):
                raise CaptureError(
                    "an operation has no place between the activations of an implicit model, since it is not affine: "
                    f"{self._suspects()}. Leave it out, or replace it by the activation or by what is affine; a "
                    "product of two computed tensors is not."
                )
            if not bool(((values[1:3] - fewer).abs() <= allowed).all()):
                raise CaptureError(
                    f"the samples of a batch depend on each other; operations seen: {', '.join(self.operations)}. "
                    "An implicit model answers each sample by itself."
                )

    def _suspects(self) -> str:
        strange = [name for name in self.operations if not _AFFINE.fullmatch(name)]
        return "it may be " + " or ".join(strange) if strange else f"seen were {', '.join(self.operations)}"


_AFFINE = re.compile(
    r"linear|conv(_transpose)?[123]d|batch_norm|(adaptive_)?avg_pool[123]d|flatten|reshape|view|permute|transpose|"
    r"contiguous|squeeze|unsqueeze|cat|stack|add_?|sub_?|neg|dropout[123]?d?|alpha_dropout|mean|sum|matmul|mm|addmm|"
    r"__getitem__|getitem|to|float|double|size|shape|dim|expand|pad|chunk|split|T|mT|clone|detach|identity|einsum|"
    r"__add__|__radd__|__iadd__|__matmul__|movedim|unflatten|ndim|dtype|device|numel|__get__|bilinear|iadd|radd|"
    r"mul_?|div_?|true_divide|__mul__|__rmul__|__truediv__|imul|rmul|itruediv|truediv|rsub|isub|__rsub__|__sub__|"
    r"upsample.*|interpolate|addcmul|bmm|baddbmm|tensordot|zeros.*|ones.*|full.*|empty.*|arange|new_.*|is_.*|"
    r"swapaxes|swapdims|roll|flip|narrow|select|index_select|gather|repeat|tile|broadcast_to|concat|concatenate|"
    r"hstack|vstack|unbind|view_as|reshape_as|atleast_.*|ravel|len|__len__|__bool__|item|tolist|"
    r"is_floating_point|requires_grad|_backward_hooks|training|type|half|bfloat16"
)


class _Watch(TorchFunctionMode):
    """Notes every activation that a module computes, and may put other values in the place of its results."""

    def __init__(self, replacements: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, Tensor]] = []
        self.operations: list[str] = []
        self.modules: list[str] = []
        self._replacements = replacements

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = _ACTIVATIONS.get(func)
        if kind is None:
            self._note(func)
            return func(*args, **kwargs)
        z: Tensor = args[0] if args else kwargs["input"]
        settings = [*args[1:], *(value for key, value in kwargs.items() if key not in ("input", "inplace"))]
        inplace = func.__name__.endswith("_") or kwargs.get("inplace", False)
        numbers = [float(s) for s in settings if not isinstance(s, bool)]
        if any(number not in _DEFAULTS.get(kind, ()) for number in numbers):
            raise CaptureError(f"{kind} with the settings {settings} is not one of the library; use its defaults.")
        where = self.modules[-1] if self.modules else ""
        self.seen.append((kind, where or kind, z.clone()))
        x = func(z.clone(), *args[1:], **{key: value for key, value in kwargs.items() if key != "input"})
        if self._replacements is not None:
            given = self._replacements[len(self.seen) - 1] if len(self.seen) <= len(self._replacements) else None
            if given is None or given.shape != z.shape:
                raise CaptureError(
                    "the activations of the teacher, or their number, depend on its input, so that it is not a "
                    "feed-forward network; an implicit model iterates, for example."
                )
            x = given.to(z)
        return z.copy_(x) if inplace else x

    def _note(self, func: Callable[..., Any]) -> None:
        name = (resolve_name(func) or getattr(func, "__name__", str(func))).removesuffix(".__get__")
        name = name.rsplit(".", 1)[-1]
        if name not in self.operations:
            self.operations.append(name)


@contextmanager
def _running(module: nn.Module, watch: _Watch) -> Iterator[None]:
    """Run ``module`` in eval mode and without gradients, watched; afterwards it is as it was."""
    modes = [(m, m.training) for m in module.modules()]
    names = {m: name for name, m in module.named_modules()}

    def enter(m: nn.Module, _: Any) -> None:
        watch.modules.append(names.get(m, ""))

    def leave(m: nn.Module, _: Any, __: Any) -> None:
        watch.modules.pop()

    handles = (register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True))
    try:
        module.eval()
        with torch.no_grad(), watch:
            yield
    finally:
        for handle in handles:
            handle.remove()
        for m, training in modes:
            m.training = training


def _failure(module: nn.Module, example: Tensor, error: Exception) -> str:
    """Say on what a teacher fails, and what to do where dtypes are a reason."""
    seen = f"`teacher` fails on samples of shape {tuple(example.shape[1:])} and dtype {example.dtype}: {error}"
    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), example.dtype)
    return seen if own == example.dtype else f"{seen}\n    Its parameters are {own}; convert the inputs: u.to({own})."


def _unique(names: Sequence[str]) -> list[str]:
    """Number the names that occur again: ``relu``, ``relu_1``, ..."""
    unique: list[str] = []
    for name in names:
        count, candidate = 0, name
        while candidate in unique:
            count += 1
            candidate = f"{name}_{count}"
        unique.append(candidate)
    return unique


def _outputs(output: Any, batch: int) -> Tensor:
    """Return the outputs of a batch, one row a sample."""
    if not isinstance(output, Tensor):
        raise CaptureError(f"the teacher returns a {type(output).__name__}; wrap it so that it returns one tensor.")
    if output.dim() == 0 or output.shape[0] != batch:
        raise CaptureError(
            f"the teacher returns a tensor of shape {tuple(output.shape)} for {batch} samples; its first dimension "
            "must be the batch."
        )
    return output.flatten(1) if output.dim() > 1 else output[:, None]
