"""A warm-started path of models, from few weights to many, that can be interrupted and resumed."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from idl import checks
from idl.atomic import write_bytes
from idl.nn import SparseImplicitModel
from idl.sim.certificate import Certificate, WeightsKept
from idl.sim.fitting import empty_model
from idl.sim.recording import Recorded, check_sources, record
from idl.sim.sim import SIM
from idl.sim.solvers.base import RowSolution

_FORMAT = "idl sim 1"


def lambda_path(
    teacher: nn.Module,
    loader: Iterable[Any],
    lams: Iterable[float],
    *,
    folder: str | Path | None = None,
    **settings: Any,
) -> Iterator[SIM]:
    """Return an iterator of a fitted :class:`~idl.SIM` for each ``lam``, the largest first, each started from the last.

    The teacher is run once for all of them, when the first is asked for, and the loader passed over once more for each.

    Args:
        teacher: See :meth:`~idl.SIM.fit`.
        loader: See :meth:`~idl.SIM.fit`.
        lams: Weights of the penalty, in any order.
        folder: Where each fit is written as soon as it is done, and looked up if it is there: an interrupted path goes
            on from the last one, to the same numbers. The files are safetensors.
        **settings: The other arguments of :class:`~idl.SIM`.

    Raises:
        TypeError, ValueError: At once, if an argument cannot be used, as :class:`~idl.SIM` does. Of the iterator, as
            :meth:`~idl.SIM.fit` does, or if ``folder`` holds a path of other settings or data, or a damaged file.
        CaptureError: Of the iterator, as :meth:`~idl.SIM.fit` does.

    Example:
        >>> teacher = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
        >>> for sim in lambda_path(teacher, [torch.randn(200, 8)], [1e-4, 1e-2]):
        ...     print(sim.lam, sim.certificate_.feasible)
        0.01 True
        0.0001 True
    """
    check_sources(teacher, loader)
    unfitted = [SIM(lam=lam, **settings) for lam in sorted(_checked_lams(lams), reverse=True)]
    if len(unfitted) > 1 and unfitted[0].exact:
        raise ValueError("`lams` must be a single one with exact=True, whose weights do not depend on it.")
    if folder is not None and not isinstance(folder, (str, Path)):
        raise TypeError(f"`folder` must be None or the path of a folder; got {folder!r}.")
    folder = None if folder is None else Path(folder)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ValueError(f"`folder` must be a folder; {folder} is a file.")
    return _fitted(teacher, loader, unfitted, folder)


def _checked_lams(lams: object) -> list[float]:
    if not isinstance(lams, Iterable) or isinstance(lams, str) or getattr(lams, "ndim", 1) == 0:
        raise TypeError(f"`lams` must be several weights of the penalty; got {lams!r}. Try [1e-2, 1e-3].")
    numbers = [lam.item() if isinstance(lam, Tensor) and lam.dim() == 0 else lam for lam in lams]
    return [checks.positive(f"lams[{i}]", number) for i, number in enumerate(numbers)]


def _fitted(teacher: nn.Module, loader: Iterable[Any], unfitted: Sequence[SIM], folder: Path | None) -> Iterator[SIM]:
    """Yield these one after the other, fitted or read."""
    if not unfitted:
        return
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(False):  # as in SIM.fit
        recorded, near = record(teacher, loader, unfitted[0].layers, unfitted[0].settings.check_sizes), None
    for sim in unfitted:
        path = None if folder is None else folder / f"lam-{sim.lam!r}.safetensors"
        if path is not None and path.exists():
            near = _read(path, sim, recorded)
        else:
            with torch.inference_mode(False):
                near = sim.fit_recorded(recorded, loader, near)
            if path is not None:
                write_bytes(path, _written(near, recorded))
        yield near


def _written(sim: SIM, recorded: Recorded) -> bytes:
    certificate = sim.certificate_
    tensors = {f"model.{name}": tensor for name, tensor in sim.model_.state_dict().items()}
    tensors |= {"row_sums": certificate.row_sums, "explained": certificate.explained, **_identity(recorded)}
    for name in ("states", "outputs"):
        rows = getattr(certificate, name)
        tensors |= {f"{name}.{f.name}": v for f in fields(rows) if isinstance(v := getattr(rows, f.name), Tensor)}
    metadata = {
        "format": _FORMAT,
        "settings": _described(sim),
        "steps": json.dumps([certificate.states.steps, certificate.outputs.steps]),
        "weights_kept": json.dumps(asdict(certificate.weights_kept)),
        "rescaling": certificate.rescaling,
        "samples": str(certificate.samples),
    }
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)


def _read(path: Path, sim: SIM, recorded: Recorded) -> SIM:
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or no file of a path ({error}); delete it to fit again.") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} is no file of a path; name another folder.")
    same_data = metadata["samples"] == str(recorded.moments.samples) and all(
        tensors[name].shape == value.shape and torch.allclose(tensors[name].to(value), value, rtol=1e-9, atol=0)
        for name, value in _identity(recorded).items()
    )
    if metadata["settings"] != _described(sim) or not same_data:
        what = "settings" if same_data else "data, or of another teacher"
        raise ValueError(f"{path} is of other {what}; name another folder, or delete it to fit again.")
    model = SparseImplicitModel(empty_model(recorded, sim.settings))
    model.load_state_dict(_below("model", tensors))
    tensors = {name: tensor.to(recorded.moments.gram.device) for name, tensor in tensors.items()}
    first, second = json.loads(metadata["steps"])
    sim.model_, sim.certificate_ = (
        model,
        Certificate(
            RowSolution(steps=first, **_below("states", tensors)),
            RowSolution(steps=second, **_below("outputs", tensors)),
            sim.solver.tol,
            tensors["row_sums"],
            sim.kappa,
            WeightsKept(**json.loads(metadata["weights_kept"])),
            tensors["explained"],
            metadata["rescaling"],
            int(metadata["samples"]),
            sim.rank,
        ),
    )
    return sim


def _below(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with this one, without it."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def _identity(recorded: Recorded) -> dict[str, Tensor]:
    """Return what two recordings of the same teacher on the same samples share."""
    return {"gram_diagonal": recorded.moments.gram.diagonal().clone(), "energies": recorded.moments.energies}


def _described(sim: SIM) -> str:
    return repr((sim.settings, sim.layers))
