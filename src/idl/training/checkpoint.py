"""A training run in one file, from which it continues to the same numbers.

The file is safetensors, so that reading one never runs code. When to write one is the training loop's
business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from idl.atomic import write_bytes
from idl.training.runs import check_json, settings_that_differ

_FORMAT = "idl checkpoint 1"


class CheckpointError(ValueError):
    """A checkpoint cannot be continued from: damaged, foreign, or of a run with other settings.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     layer = nn.Linear(1, 1)
        ...     try:
        ...         load_checkpoint(
        ...             Path(file.name), model=layer, optimizer=torch.optim.Adam(layer.parameters()), settings={}
        ...         )
        ...     except CheckpointError as error:
        ...         print(str(error).splitlines()[-1].strip())
        Name another file; if a run of idl wrote this one, delete it to start that run again.
    """


def save_checkpoint(
    path: str | Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, object],
    position: Mapping[str, object],
) -> None:
    """Write everything that the rest of a run depends on to one file, whole or not at all.

    Args:
        path: File to write; its folder must exist.
        model: Model in training.
        optimizer: Optimizer whose parameters are parameters of ``model``.
        settings: Everything that decides the numbers of the run, as JSON values.
        position: Where the run is and what it counted so far, as JSON values. Floats come back exactly.

    Raises:
        TypeError, ValueError: If JSON has no form for a value, or ``optimizer`` has parameters that ``model`` has not.
        OSError: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> layer = nn.Linear(1, 1)
        >>> optimizer = torch.optim.Adam(layer.parameters())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "checkpoint.safetensors"
        ...     save_checkpoint(file, model=layer, optimizer=optimizer, settings={"seed": 0}, position={"step": 7})
        ...     load_checkpoint(file, model=layer, optimizer=optimizer, settings={"seed": 0})
        {'step': 7}
    """
    check_json("settings", settings)
    check_json("position", position, allow_nan=True)
    _parameter_names(model, optimizer, ValueError)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    numbers: dict[str, object] = {}
    for name, state in _optimizer_state(model, optimizer).items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
            else:
                numbers[f"optimizer.{name}.{key}"] = value
    tensors["random.cpu"] = torch.get_rng_state()
    if any(parameter.is_cuda for parameter in model.parameters()):
        tensors |= {f"random.cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    metadata = {
        "format": _FORMAT,
        "settings": json.dumps(settings),
        "position": json.dumps(position),
        "optimizer": json.dumps({"groups": groups, "numbers": numbers}),
    }
    # A copy of each tensor, since safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    write_bytes(path, safetensors.torch.save(copies, metadata=metadata))


def load_checkpoint(
    path: str | Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, object]
) -> dict[str, object]:
    """Put model, optimizer and random state back as they were when the checkpoint was written.

    Everything is checked before anything is changed.

    Args:
        path: File that :func:`save_checkpoint` wrote.
        model: Model of the same shapes, on any device.
        optimizer: Optimizer of the same kind over the parameters of ``model``.
        settings: Settings of the run that wants to continue; they must be those of the run that was saved.

    Returns:
        The position that was saved.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged or no checkpoint, if a setting differs (each is named), if its
            tensors do not fit ``model``, or if ``optimizer`` is over other parameters.

    Example:
        See :func:`save_checkpoint`.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    position = json.loads(metadata["position"])
    described = json.loads(metadata["optimizer"])
    differences = settings_that_differ(json.loads(metadata["settings"]), settings)
    if differences:
        raise CheckpointError(
            f"The checkpoint {path} belongs to a run with other settings: {', '.join(differences)}.\n"
            "    Use the settings of that run, another run folder, or delete the file to start again."
        )
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    _check_shapes(path, weights, model)
    optimizer_state: dict[str, dict[str, object]] = {}
    values: dict[str, object] = {**described["numbers"]}
    values |= {name: value for name, value in tensors.items() if name.startswith("optimizer.")}
    for name, value in values.items():
        parameter, key = name.removeprefix("optimizer.").rsplit(".", 1)
        optimizer_state.setdefault(parameter, {})[key] = value

    restored = _optimizer_state_dict(path, model, optimizer, optimizer_state, described["groups"])

    model.load_state_dict(weights)
    optimizer.load_state_dict(restored)
    torch.set_rng_state(tensors["random.cpu"])
    cuda_states = [tensors[name] for name in sorted(tensors, key=_last_number) if name.startswith("random.cuda.")]
    if cuda_states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda_states[: torch.cuda.device_count()])
    return dict(position)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a checkpoint."""
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder and no checkpoint.\n    Name a file.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # not views of the file
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or no checkpoint of idl ({error}).\n"
            "    Name another file; if a run of idl wrote this one, delete it to start that run again."
        ) from error
    written = metadata.get("format", "")
    if written != _FORMAT:
        ours = written.startswith(_FORMAT.rstrip("0123456789"))
        raise CheckpointError(
            f"{path} is a safetensors file but no checkpoint of this version of idl: its format must be "
            f"{_FORMAT!r}, got {written!r}.\n    "
            + ("Delete it to start the run again." if ours else "Name another file.")
        )
    return tensors, metadata


def _check_shapes(path: Path, weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise if the saved weights are not those of ``model``, naming the first that is not."""
    expected = model.state_dict()
    for name in sorted(weights.keys() | expected.keys()):
        saved = tuple(weights[name].shape) if name in weights else "absent"
        wanted = tuple(expected[name].shape) if name in expected else "absent"
        if saved != wanted:
            raise CheckpointError(
                f"The checkpoint {path} is of another model: {name} is {saved} there and {wanted} here.\n"
                "    Build the model of that run, or delete the file to start again."
            )


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, object]]:
    """Return the optimizer's state by the name of the parameter that it belongs to."""
    return {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}


def _optimizer_state_dict(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Mapping[str, object]],
    groups: list[dict[str, object]],
) -> dict[str, object]:
    """Return what ``optimizer.load_state_dict`` wants: state by position, groups with their parameters."""
    order = _parameter_names(model, optimizer, CheckpointError)
    own = optimizer.state_dict()["param_groups"]
    if len(own) != len(groups) or not state.keys() <= set(order):
        raise CheckpointError(
            f"The checkpoint {path} is of an optimizer over other parameters.\n"
            "    Build the optimizer of that run, or delete the file to start again."
        )
    hyperparameters = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()} for group in groups
    ]
    return {
        "state": {index: state[name] for index, name in enumerate(order) if name in state},
        "param_groups": [{**mine, **saved} for mine, saved in zip(own, hyperparameters, strict=True)],
    }


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer, error: type[ValueError]) -> list[str]:
    """Return the names that the optimizer's parameters have in ``model``; raise ``error`` if one has none."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if foreign := sum(parameter not in names for parameter in parameters):
        raise error(
            f"`optimizer` must be over parameters of `model`; {foreign} of its {len(parameters)} are not. "
            "Build it with model.parameters() of this very model."
        )
    return [names[parameter] for parameter in parameters]


def _last_number(name: str) -> int:
    last = name.rsplit(".", 1)[-1]
    return int(last) if last.isdigit() else -1
