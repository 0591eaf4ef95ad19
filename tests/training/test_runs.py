import pytest
import safetensors.torch
import torch

from idl.training import ExplicitMLP, RunFolder, save_weights, settings_that_differ


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
