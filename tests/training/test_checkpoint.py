import pytest
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
    with pytest.raises(CheckpointError, match="is damaged or no checkpoint"):
        load(checkpoint)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "text").write_text("hello, this is a text and no checkpoint")
    with pytest.raises(CheckpointError, match="is damaged or no checkpoint"):
        load(tmp_path / "text")
    save_weights(tmp_path / "weights.safetensors", trained()[0])
    with pytest.raises(CheckpointError, match="no checkpoint of this version of idl"):
        load(tmp_path / "weights.safetensors")


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
