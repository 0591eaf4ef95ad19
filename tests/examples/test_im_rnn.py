"""examples/im_rnn runs as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("typer")
FOLDER = Path(__file__).parents[2] / "examples" / "im_rnn"


def run(*arguments, cwd, script="train.py"):
    return subprocess.run(
        [sys.executable, str(FOLDER / script), *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("dataset", ["spiky", "sunspots", "argmax"])
def test_smoke_runs_on_every_data_set_and_leaves_its_folder(dataset, tmp_path):
    result = run("--smoke", "--dataset", dataset, "--out", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["parameters"] > 1000 and len(metrics["epochs"]) == 2
    pictures = {"training.png"} | ({"forecast.png"} if dataset != "argmax" else set())
    assert pictures <= {path.name for path in (tmp_path / "run").iterdir()}
    assert ("accuracy_by_range" in metrics) == (dataset == "argmax")
    again = run("--smoke", "--dataset", dataset, "--out", "run", cwd=tmp_path)
    assert again.returncode == 0 and "Finished already" in again.stdout


def test_all_models_have_about_as_many_parameters():
    sys.path.insert(0, str(FOLDER))
    try:
        from models import MODELS, build, parameters
    finally:
        sys.path.remove(str(FOLDER))
    sizes = {name: parameters(build(name, 1, 1, 10, (20, 20), 0)) for name in MODELS}
    recurrent = [size for name, size in sizes.items() if name != "linear"]
    assert max(recurrent) < 1.05 * min(recurrent)
    assert sizes["linear"] == 11


def test_an_interrupted_run_continues_to_the_same_numbers(tmp_path):
    arguments = ["--dataset", "sunspots", "--epochs", "8"]
    whole = run(*arguments, "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [sys.executable, str(FOLDER / "train.py"), *arguments, "--out", "parts"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ},
    )
    settings, deadline = tmp_path / "parts" / "settings.json", time.monotonic() + 120
    while not settings.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    resumed = run(*arguments, "--out", "parts", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    first, second = (json.loads((tmp_path / f / "metrics.json").read_text())["epochs"] for f in ("whole", "parts"))
    assert first == second


def test_an_unknown_option_is_refused_with_a_message(tmp_path):
    result = run("--dataset", "tides", cwd=tmp_path)
    assert result.returncode == 2 and "tides" in result.stderr


def test_the_table_is_made_at_toy_size(tmp_path):
    result = run("--smoke", cwd=tmp_path, script="table.py")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| ImplicitRNN |") == 4
    assert "| x100000 |" in result.stdout
