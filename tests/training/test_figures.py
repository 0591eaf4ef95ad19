import sys

import pytest
import torch

from idl.training import EpochRecord, History, draw_equilibrium, draw_forecast, draw_tradeoff, draw_training

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


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("histories", [History(tuple(RECORDS), 1.0), {"implicit": History(tuple(RECORDS), 1.0)}])
def test_a_whole_history_is_refused_where_records_are_wanted(tmp_path, histories):
    with pytest.raises(TypeError, match=r"`histories` must .*; got a History"):
        draw_training(histories, tmp_path / "training.png")


def test_a_model_without_an_epoch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one epoch of each model; got none of 'implicit'"):
        draw_training({"implicit": []}, tmp_path / "training.png")


@pytest.mark.usefixtures("as_users_run_it")
def test_a_forecast_of_another_length_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`forecasts` must be shaped like `truth`, \(9,\); got \(8,\) of 'rnn'"):
        draw_forecast(torch.zeros(9), {"rnn": torch.zeros(8)}, tmp_path / "forecast.png")


def test_twelve_curves_are_drawn_and_other_numbers_refused(tmp_path):
    def draw(methods, points=((10.0, 85.0),)):
        draw_tradeoff({f"method {i}": points for i in range(methods)}, 89.0, f"{tmp_path}/tradeoff.png")

    draw(12)
    assert_is_a_png_of_1350_pixels(tmp_path / "tradeoff.png")
    for methods in (0, 13):
        with pytest.raises(ValueError, match=f"`curves` must have 1 to 12 methods; got {methods}"):
            draw(methods)
    with pytest.raises(ValueError, match="at least one point of each method; got none of method 0"):
        draw(1, points=())
