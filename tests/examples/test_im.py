import importlib.util
import json
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from idl.training import experiment

FOLDER = Path(__file__).parents[2] / "examples" / "im"


@pytest.fixture
def example(monkeypatch):
    """Return the module of train.py, loaded as table.py would find it."""
    specification = importlib.util.spec_from_file_location("train", FOLDER / "train.py")
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "train", module)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def run(example):
    app = typer.Typer()
    app.command()(example.main)

    def run(*arguments):
        return CliRunner().invoke(app, ["--smoke", *map(str, arguments)])

    return run


def metrics(folder):
    content = json.loads((folder / "metrics.json").read_text())
    del content["seconds"]
    return content


def test_smoke_runs_as_a_script(tmp_path):
    script = [
        sys.executable,
        "-W",
        "error",
        FOLDER / "train.py",
        "--smoke",
        "--dataset",
        "digits",
        "--epochs",
        "3",  # what is asked for goes before what is tiny
        "--out",
        tmp_path / "run",
    ]
    result = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(json.loads((tmp_path / "run" / "metrics.json").read_text())["epochs"]) == 3
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "metrics.json",
        "settings.json",
        "training.png",
        "weights.safetensors",
    ]


@pytest.mark.parametrize("options", [(), ("--low-rank", "--rank=2"), ("--model=mlp",)], ids=" ".join)
def test_an_interrupted_run_continues_to_the_same_metrics(tmp_path, example, run, monkeypatch, options):
    assert run("--out", tmp_path / "whole", *options).exit_code == 0
    bar = experiment.progress_line

    @contextmanager
    def interrupting(label, console):
        with bar(label, console) as show:

            def show_and_interrupt(progress):
                show(progress)
                signal.raise_signal(signal.SIGINT)

            yield show_and_interrupt

    monkeypatch.setattr(experiment, "progress_line", interrupting)
    result = run("--out", tmp_path / "parts", *options)
    assert result.exit_code == 130
    assert "To continue where it stopped" in result.output
    monkeypatch.setattr(experiment, "progress_line", bar)
    assert run("--out", tmp_path / "parts", *options).exit_code == 0
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_a_finished_run_is_looked_up_unless_fresh(tmp_path, run):
    run("--out", tmp_path / "run")
    before = (tmp_path / "run" / "weights.safetensors").stat().st_mtime_ns
    result = run("--out", tmp_path / "run")
    assert "Finished already" in result.output
    assert (tmp_path / "run" / "weights.safetensors").stat().st_mtime_ns == before
    run("--out", tmp_path / "run", "--fresh")
    assert (tmp_path / "run" / "weights.safetensors").stat().st_mtime_ns > before


def test_other_settings_in_the_same_folder_are_refused_by_name(tmp_path, run):
    run("--out", tmp_path / "run")
    result = run("--out", tmp_path / "run", "--seed=1")
    assert result.exit_code == 1
    assert "seed (0 there, 1 here)" in result.output
    assert run("--out", tmp_path / "run", "--seed=1", "--fresh").exit_code == 0


@pytest.mark.parametrize("options", [("--rank=2",), ("--low-rank",), ("--device=abacus",), ("--dataset=letters",)])
def test_options_that_make_no_sense_are_a_usage_error(tmp_path, run, options):
    result = run("--out", tmp_path / "run", *options)
    assert result.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_the_table_has_mean_and_deviation_over_the_seeds(tmp_path, example, monkeypatch):
    specification = importlib.util.spec_from_file_location("table", FOLDER / "table.py")
    table = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(table)

    def measured(settings, out, console):
        record = {"train_loss": 0.3, "train_accuracy": 0.9, "test_loss": 0.3, "test_accuracy": 0.9}
        metrics = {"parameters": 97240, "seconds": 10.0, "epochs": [record]}
        metrics["test_accuracy"] = 0.87 + 0.01 * settings.seed
        if settings.model == "implicit":
            metrics["equilibrium"] = {"steps_median": 12.0, "steps_max": 20 + settings.seed}
        return metrics

    monkeypatch.setattr(table, "train", measured)
    app = typer.Typer()
    app.command()(table.main)
    result = CliRunner().invoke(app, ["--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "| implicit, full rank | 97,240 | 88.00 ± 1.00 % | 12 (22) | 10 |" in result.output
    assert "| MLP, rank 2 | 97,240 | 88.00 ± 1.00 % | - | 10 |" in result.output
    assert (tmp_path / "training.png").exists()
