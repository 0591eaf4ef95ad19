import sys

import pytest
import torch

from idl.training import EpochRecord, draw_equilibrium, draw_training

RECORDS = [EpochRecord(1.0 / epoch, 1 - 0.5 / epoch, 1.2 / epoch, 0.9 - 0.4 / epoch) for epoch in range(1, 9)]


def assert_is_a_png_of_1350_pixels(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(content[16:20], "big") == 1350  # 9 inches at 150 dpi
    assert content[-8:-4] == b"IEND"


@pytest.mark.parametrize("epochs", [1, 8])
def test_the_picture_of_a_training_is_written(tmp_path, epochs):
    draw_training({"implicit": RECORDS[:epochs], "explicit": RECORDS[:epochs]}, tmp_path / "training.png")
    assert_is_a_png_of_1350_pixels(tmp_path / "training.png")


@pytest.mark.parametrize("samples", [1, 30])
def test_the_picture_of_an_equilibrium_is_written_also_where_samples_have_arrived(tmp_path, samples):
    residuals = 0.5 ** torch.arange(40.0).unsqueeze(1).expand(40, samples).clone()
    residuals[20:, 0] = 0
    draw_equilibrium(residuals, torch.eye(4) * 0.5, tmp_path / "equilibrium.png", rate=0.5)
    assert_is_a_png_of_1350_pixels(tmp_path / "equilibrium.png")


def test_the_picture_of_inputs_that_are_their_own_equilibrium_is_written(tmp_path):
    draw_equilibrium(torch.zeros(1, 3), torch.zeros(4, 4), tmp_path / "equilibrium.png", rate=0.0)
    assert_is_a_png_of_1350_pixels(tmp_path / "equilibrium.png")


def test_the_state_of_pyplot_is_left_alone(tmp_path):
    loaded = "matplotlib.pyplot" in sys.modules
    draw_training({"implicit": RECORDS}, tmp_path / "training.png")
    assert ("matplotlib.pyplot" in sys.modules) == loaded


@pytest.mark.parametrize("models", [0, 5])
def test_a_number_of_models_without_colours_is_refused(tmp_path, models):
    with pytest.raises(ValueError, match="1 to 4 models"):
        draw_training({str(model): RECORDS for model in range(models)}, tmp_path / "training.png")


def test_where_numbers_are_learned_only_the_loss_is_drawn(tmp_path):
    records = [EpochRecord(1.0 / epoch, None, 1.2 / epoch, None) for epoch in range(1, 9)]
    draw_training({"implicit": records}, tmp_path / "training.png")
    content = (tmp_path / "training.png").read_bytes()
    assert int.from_bytes(content[16:20], "big") == 750
