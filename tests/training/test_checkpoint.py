import pytest
import safetensors.torch
import torch

from idl.training import CheckpointError, ExplicitMLP, load_checkpoint, save_checkpoint, save_weights


def trained(hidden_dim=3):
    torch.manual_seed(0)
    model = ExplicitMLP(4, hidden_dim, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.8, 0.99))
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def checkpoint(tmp_path):
    model, optimizer = trained()
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, model=model, optimizer=optimizer, settings={"seed": 0}, position={"loss": 0.1 + 0.2})
    return path


def load(path, model=None, optimizer=None):
    if model is None:
        model, optimizer = trained()
    return load_checkpoint(path, model=model, optimizer=optimizer, settings={"seed": 0})


def test_position_and_hyperparameters_come_back_exactly(checkpoint):
    model = ExplicitMLP(4, 3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    assert load(checkpoint, model, optimizer) == {"loss": 0.1 + 0.2}
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.99)
    assert optimizer.state[model.B]["step"] == 1


def test_state_that_is_no_tensor_is_kept(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight]["count"] = 7
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, model=model, optimizer=optimizer, settings={"seed": 0}, position={})
    other = torch.nn.Linear(2, 2)
    restored = torch.optim.SGD(other.parameters())
    load(path, other, restored)
    assert restored.state[other.weight] == {"count": 7}


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(checkpoint, kept):
    checkpoint.write_bytes(checkpoint.read_bytes()[:kept])
    with pytest.raises(
        CheckpointError, match=r"is damaged or no checkpoint.*\n.*if a run of idl wrote this one, delete it"
    ):
        load(checkpoint)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "text").write_text("hello, this is a text and no checkpoint")
    with pytest.raises(CheckpointError, match="is damaged or no checkpoint"):
        load(tmp_path / "text")
    save_weights(tmp_path / "weights.safetensors", trained()[0])
    with pytest.raises(CheckpointError, match=r"no checkpoint of this version of idl.*\n    Name another file.$"):
        load(tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"is a folder and no checkpoint.\n    Name a file.$"):
        load(tmp_path)


def test_a_checkpoint_of_another_version_may_be_deleted(tmp_path):
    content = safetensors.torch.save({"model.A": torch.zeros(1)}, metadata={"format": "idl checkpoint 0"})
    (tmp_path / "old").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"got 'idl checkpoint 0'.\n    Delete it to start the run again"):
        load(tmp_path / "old")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        load(tmp_path / "checkpoint.safetensors")


def test_another_model_is_refused_by_the_tensor_that_does_not_fit(checkpoint):
    with pytest.raises(CheckpointError, match=r"A is \(3, 3\) there and \(5, 5\) here"):
        load(checkpoint, *trained(hidden_dim=5))


def test_an_optimizer_over_other_parameters_is_refused_before_anything_changes(checkpoint):
    model = ExplicitMLP(4, 3, 2)
    before = model.B.detach().clone()
    with pytest.raises(CheckpointError, match="an optimizer over other parameters"):
        load(checkpoint, model, torch.optim.Adam([model.A]))
    assert torch.equal(model.B, before)


def test_an_optimizer_of_another_model_is_refused_at_both_ends(checkpoint):
    (model, _), (_, optimizer) = trained(), trained()
    saved = checkpoint.read_bytes()
    with pytest.raises(ValueError, match="`optimizer` must be over parameters of `model`; 4 of its 4 are not"):
        save_checkpoint(checkpoint, model=model, optimizer=optimizer, settings={}, position={})
    assert checkpoint.read_bytes() == saved
    with pytest.raises(CheckpointError, match="`optimizer` must be over parameters of `model`"):
        load(checkpoint, model, optimizer)


def test_a_path_may_be_a_string(checkpoint):
    assert load(str(checkpoint)) == {"loss": 0.1 + 0.2}


@pytest.mark.parametrize("part", ["settings", "position"])
def test_what_json_has_no_form_for_is_refused_by_its_key(tmp_path, part):
    model, optimizer = trained()
    parts = {"settings": {}, "position": {}, part: {"device": torch.device("cpu")}}
    with pytest.raises(TypeError, match=f"`{part}` must be JSON values; got 'device'"):
        save_checkpoint(tmp_path / "checkpoint", model=model, optimizer=optimizer, **parts)
