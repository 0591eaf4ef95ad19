"""examples/im_attention runs as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("typer")
FOLDER = Path(__file__).parents[2] / "examples" / "im_attention"


def command(*arguments, script="train.py"):
    return [sys.executable, str(FOLDER / script), *arguments]


def run(*arguments, cwd, script="train.py", **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        command(*arguments, script=script), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("model", ["softmax", "lipschitz"])
def test_smoke_runs_and_leaves_its_folder(model, tmp_path):
    result = run("--smoke", "--model", model, "--out", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["equilibria"]["converged"] == 1
    assert metrics["epochs"][-1]["test_loss"] < metrics["epochs"][0]["train_loss"]
    assert {"training.png", "sample.txt", "weights.safetensors"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert len((tmp_path / "run" / "sample.txt").read_text()) > 400
    again = run("--smoke", "--model", model, "--out", "run", cwd=tmp_path)
    assert again.returncode == 0 and "Finished already" in again.stdout


def test_a_conversion_goes_on_from_the_explicit_model(tmp_path):
    result = run("--smoke", "--model", "converted", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folders = sorted((tmp_path / "runs" / "im_attention").iterdir())
    explicit, converted = sorted(
        (json.loads((folder / "metrics.json").read_text()) for folder in folders), key=lambda m: m["parameters"]
    )
    assert explicit["equilibria"] is None and converted["equilibria"]["converged"] == 1
    assert converted["epochs"][0]["train_loss"] < explicit["epochs"][0]["train_loss"]


def test_an_interrupted_run_continues_to_the_same_numbers(tmp_path):
    arguments = ["--smoke", "--model", "softmax", "--epochs", "20"]
    whole = run(*arguments, "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(*arguments, "--out", "parts"), cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True
    )
    settings, deadline = tmp_path / "parts" / "settings.json", time.monotonic() + 120
    while not settings.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    resumed = run(*arguments, "--out", "parts", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    first, second = (json.loads((tmp_path / f / "metrics.json").read_text())["epochs"] for f in ("whole", "parts"))
    assert first == second


def test_without_its_text_a_run_says_where_to_put_it(tmp_path):
    result = run(
        "--dataset",
        "tinyshakespeare",
        cwd=tmp_path,
        IDL_DATA_HOME=str(tmp_path),
        http_proxy="http://127.0.0.1:9",
        https_proxy="http://127.0.0.1:9",
    )
    assert result.returncode == 1 and "tinyshakespeare.txt" in result.stderr


def test_the_table_is_made_at_toy_size(tmp_path):
    result = run("--smoke", cwd=tmp_path, script="table.py")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 9
