"""The folder that a training run leaves behind: its settings, its results, its weights.

How training works, and what the settings mean, is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import safetensors.torch
from torch import nn

from idl.atomic import write_bytes, write_json

_MARK = "written_by"


@dataclass(frozen=True)
class RunFolder:
    """A folder with ``settings.json`` from the start of a run and ``metrics.json`` from its end.

    Weights, checkpoints and pictures lie beside them under names that the run chooses. The metrics are
    written last: a folder that has them holds a finished run.

    Args:
        path: The folder, made by :meth:`open`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder = RunFolder.open(Path(place) / "run")
        ...     folder.start({"seed": 0})
        ...     folder.finish({"test_loss": 0.5})
        ...     folder.finished({"seed": 0})
        {'test_loss': 0.5}
    """

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Return the run folder at ``path``, made with its parents if it does not exist.

        Args:
            path: A folder that does not exist, is empty, or belongs to an earlier run.

        Raises:
            FileExistsError: If there is a file, or a folder with other files, which a run would mix with its
                own.
        """
        path = Path(path)
        advice = "Name a new folder, or the folder of an earlier run."
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"The run folder {path} is a file. {advice}")
        folder = cls(path)
        # Settings are written first: a folder with other files and without them is not a run's.
        foreign = path.is_dir() and any(file.suffix != ".part" for file in path.iterdir())
        if foreign and folder.settings() is None:
            raise FileExistsError(f"The folder {path} has files that no run of idl wrote. {advice}")
        path.mkdir(parents=True, exist_ok=True)
        return folder

    def finished(self, settings: Mapping[str, object]) -> dict[str, object] | None:
        """Return the results if the folder holds a finished run with these settings; ``None`` if one may go on here.

        Args:
            settings: As for :meth:`start`.

        Raises:
            ValueError: If the folder holds a run with other settings.
        """
        if (earlier := self.settings()) is None:
            return None
        if differences := settings_that_differ(earlier, settings):
            raise ValueError(
                f"{self.path} holds a run with other settings: {', '.join(differences)}.\n"
                "    Name another folder with --out, or start again in this one with --fresh."
            )
        return self.metrics()

    def start(self, settings: Mapping[str, object]) -> None:
        """Write the settings and mark the run as unfinished.

        Args:
            settings: Everything that decides the numbers of the run, as JSON values.

        Raises:
            TypeError, ValueError: If JSON has no form for a setting, which is named.
        """
        check_json("settings", settings)
        (self.path / "metrics.json").unlink(missing_ok=True)
        write_json(self.path / "settings.json", {_MARK: "idl", **settings})

    def finish(self, metrics: Mapping[str, object]) -> None:
        """Write the results; the run counts as finished from then on.

        Args:
            metrics: The results, as JSON values; a number may be infinite or NaN.

        Raises:
            TypeError, ValueError: If JSON has no form for a result, which is named.
        """
        check_json("metrics", metrics, allow_nan=True)
        write_json(self.path / "metrics.json", metrics)

    def settings(self) -> dict[str, object] | None:
        """Return the settings of the run in this folder, or ``None`` if it holds none."""
        settings = _read_json(self.path / "settings.json")
        if settings is None or settings.pop(_MARK, None) != "idl":
            return None
        return settings

    def metrics(self) -> dict[str, object] | None:
        """Return the results of the run, or ``None`` if it has not finished."""
        return _read_json(self.path / "metrics.json")


def save_weights(path: str | Path, model: nn.Module) -> None:
    """Write the parameters and buffers of ``model`` to a safetensors file, whole or not at all.

    Args:
        path: File to write; its folder must exist.
        model: Model whose ``state_dict`` is saved; ``load_state_dict(safetensors.torch.load_file(path))``
            restores it.

    Raises:
        OSError: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(Path(folder) / "weights.safetensors", nn.Linear(2, 1))
        ...     list(safetensors.torch.load_file(Path(folder) / "weights.safetensors"))
        ['bias', 'weight']
    """
    # A copy of each tensor, since safetensors refuses tensors that share memory.
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    write_bytes(path, safetensors.torch.save(tensors))


def settings_that_differ(saved: Mapping[str, object], wanted: Mapping[str, object]) -> list[str]:
    """Name each setting that differs, as ``name (saved value, wanted value)`` in words.

    Args:
        saved: Settings of the earlier run, as read from JSON.
        wanted: Settings of this run.

    Returns:
        One phrase for each name that has another value or stands on one side only; empty if the settings
        agree.

    Example:
        >>> settings_that_differ({"seed": 0, "epochs": 3}, {"seed": 1, "epochs": 3})
        ['seed (0 there, 1 here)']
    """
    wanted = cast(dict[str, object], json.loads(json.dumps(wanted)))  # tuples as lists, as they were saved
    names = sorted(saved.keys() | wanted.keys())
    return [
        f"{name} ({_value(saved, name)} there, {_value(wanted, name)} here)"
        for name in names
        if name not in saved or name not in wanted or saved[name] != wanted[name]
    ]


def check_json(name: str, values: object, *, allow_nan: bool = False) -> None:
    """Check that ``values`` is a mapping that JSON has a form for, and name the key that it has none for."""
    if not isinstance(values, Mapping):
        raise TypeError(f"`{name}` must be a mapping from names to JSON values; got {values!r}.")
    for key, value in values.items():
        try:
            json.dumps({key: value}, allow_nan=allow_nan)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"`{name}` must be JSON values; got {key!r}: {value!r} ({error}). Try numbers, strings and lists."
            ) from error


def _value(settings: Mapping[str, object], name: str) -> str:
    return json.dumps(settings[name]) if name in settings else "absent"


def _read_json(path: Path) -> dict[str, object] | None:
    """Return the object in a JSON file, or ``None`` if there is no such file or it holds something else."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None
