from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from rich.console import Console

from idl.training import ExplicitMLP, RunFolder, finished_run, save_weights, settings_that_differ


def test_settings_and_metrics_come_back_as_they_were(tmp_path):
    folder = RunFolder.open(tmp_path / "new" / "run")
    assert (folder.settings(), folder.metrics()) == (None, None)
    folder.start({"seed": 3, "rank": None})
    folder.finish({"accuracy": 0.1 + 0.2})
    again = RunFolder.open(tmp_path / "new" / "run")
    assert again.settings() == {"seed": 3, "rank": None}
    assert again.metrics() == {"accuracy": 0.1 + 0.2}


def test_a_run_that_starts_again_is_unfinished(tmp_path):
    folder = RunFolder.open(tmp_path / "run")
    folder.start({})
    folder.finish({"accuracy": 1.0})
    folder.start({})
    assert folder.metrics() is None


def test_a_folder_with_files_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "settings.json").write_text('{"editor": "theirs"}')
    with pytest.raises(FileExistsError, match="files that no run of idl wrote"):
        RunFolder.open(tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        RunFolder.open(tmp_path / "settings.json")


def test_saved_weights_restore_the_model(tmp_path):
    torch.manual_seed(0)
    model, other = ExplicitMLP(4, 3, 2), ExplicitMLP(4, 3, 2)
    save_weights(tmp_path / "weights.safetensors", model)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "weights.safetensors"))
    u = torch.randn(5, 4)
    assert torch.equal(model(u), other(u))


def test_weights_that_share_memory_are_saved(tmp_path):
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)])
    model[1].weight = model[0].weight
    save_weights(tmp_path / "weights.safetensors", model)
    saved = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    assert torch.equal(saved["0.weight"], saved["1.weight"])


def test_each_setting_that_differs_is_named():
    assert settings_that_differ({"seed": 0, "size": [1, 2]}, {"seed": 0, "size": (1, 2)}) == []
    assert settings_that_differ({"seed": 0, "old": True}, {"seed": 1, "new": None}) == [
        "new (absent there, null here)",
        "old (true there, absent here)",
        "seed (0 there, 1 here)",
    ]


def test_paths_may_be_strings(tmp_path):
    folder = RunFolder.open(f"{tmp_path}/run")
    save_weights(f"{folder.path}/weights.safetensors", torch.nn.Linear(2, 1))
    assert (tmp_path / "run" / "weights.safetensors").exists()


def test_what_json_has_no_form_for_is_refused_by_its_key(tmp_path):
    folder = RunFolder.open(tmp_path)
    folder.start({"seed": 0})
    folder.finish({"loss": float("nan")})  # diverged, and nonetheless the result of a run
    with pytest.raises(TypeError, match=r"`settings` must be JSON values; got 'data': .*Path"):
        folder.start({"seed": 0, "data": Path("x")})
    with pytest.raises(ValueError, match="`settings` must be JSON values; got 'tol': nan"):
        folder.start({"tol": float("nan")})
    with pytest.raises(TypeError, match="`metrics` must be JSON values; got 'loss': tensor"):
        folder.finish({"accuracy": 1.0, "loss": torch.ones(1)})
    assert list(folder.metrics()) == ["loss"] and folder.settings() == {"seed": 0}


@dataclass(frozen=True)
class Settings:
    data: object = "digits"


def run(settings, out, work):
    return finished_run(settings, out, Console(quiet=True), work)


def test_settings_are_checked_before_the_work_and_before_a_folder_is_made(tmp_path):
    with pytest.raises(TypeError, match="`settings` must be JSON values; got 'data'"):
        run(Settings(Path("x")), tmp_path / "run", lambda run: {})
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("results", [None, 0.5])
def test_work_that_returns_no_metrics_is_not_finished(tmp_path, results):
    with pytest.raises(TypeError, match=f"`work` must return the metrics, .*; got {results}"):
        run(Settings(), f"{tmp_path}/run", lambda run: results)
    assert run(Settings(), f"{tmp_path}/run", lambda run: {"loss": 0.5}) == {"loss": 0.5}
