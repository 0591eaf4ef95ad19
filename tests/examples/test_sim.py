import importlib.util
import json
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

FOLDER = Path(__file__).parents[2] / "examples" / "sim"


@pytest.fixture
def example(monkeypatch):
    """Return a function that loads one of the modules, which find each other as they do when they are run."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name):
        specification = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(specification)
        monkeypatch.setitem(sys.modules, name, module)
        specification.loader.exec_module(module)
        return module

    load("train")
    return load


@pytest.fixture
def run(example):
    app = typer.Typer()
    app.command()(sys.modules["train"].main)

    def run(*arguments):
        return CliRunner().invoke(app, ["--smoke", *map(str, arguments)])

    return run


def metrics(folder):
    content = json.loads((folder / "metrics.json").read_text())
    del content["seconds"]
    return content


def test_smoke_runs_as_a_script(tmp_path):
    arguments = ["--smoke", "--dataset", "digits", "--out", tmp_path / "run"]
    script = [sys.executable, "-W", "error", FOLDER / "train.py", *arguments]
    result = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "metrics.json",
        "settings.json",
        "sparsity.png",
        "teacher.safetensors",
        "weights.safetensors",
    }


@pytest.mark.parametrize("options", [(), ("--keep=0.3",), ("--teacher=cnn",), ("--samples=200",)], ids=" ".join)
def test_a_run_is_about_as_accurate_as_its_teacher(tmp_path, run, options):
    result = run("--out", tmp_path / "run", *options)
    assert result.exit_code == 0, result.output
    found = metrics(tmp_path / "run")
    assert found["feasible"]
    assert found["teacher_accuracy"] > 0.6
    assert found["test_accuracy"] > found["teacher_accuracy"] - 0.06
    if "--keep=0.3" in options:
        assert found["weights"] <= 0.3 * found["teacher_weights"] + 1


def test_an_interrupted_run_continues_to_the_same_metrics(tmp_path, run, monkeypatch):
    assert run("--out", tmp_path / "whole").exit_code == 0
    module = sys.modules["train"]
    bar = module.progress_line

    @contextmanager
    def interrupting(label, console):
        with bar(label, console) as show:

            def show_and_interrupt(progress):
                show(progress)
                signal.raise_signal(signal.SIGINT)

            yield show_and_interrupt

    monkeypatch.setattr(module, "progress_line", interrupting)
    result = run("--out", tmp_path / "parts")
    assert result.exit_code == 130
    assert "To continue where it stopped" in result.output
    monkeypatch.setattr(module, "progress_line", bar)
    assert run("--out", tmp_path / "parts").exit_code == 0
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert "Finished already" in run("--out", tmp_path / "parts").output
    refused = run("--out", tmp_path / "parts", "--seed=1")
    assert refused.exit_code == 1
    assert "seed (0 there, 1 here)" in refused.output


@pytest.mark.parametrize("option", ["--keep=2.0", "--lam=0", "--lam=-1", "--device=abacus"])
def test_an_option_out_of_range_is_refused_before_the_teacher_is_trained(tmp_path, run, option):
    result = run("--out", tmp_path / "run", option)
    assert result.exit_code in (1, 2)  # 2 is that of an option which typer refuses
    assert option.split("=")[0].removeprefix("--") in result.output
    assert "teacher" not in result.output


def test_the_tables_are_measured_once(tmp_path, example):
    table = example("table")
    app = typer.Typer()
    app.command()(table.main)
    arguments = ["--smoke", "--dataset=digits", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for method in table.METHODS:
        assert f"\n| {method} | " in result.output
    assert (tmp_path / "accuracy.png").exists()
    kept = json.loads((tmp_path / "results.json").read_text())
    one = next(iter(kept))
    del kept[one]
    (tmp_path / "results.json").write_text(json.dumps(kept))
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert one in json.loads((tmp_path / "results.json").read_text())
    of_others = CliRunner().invoke(app, [*arguments, "--dataset=mnist"])
    assert of_others.exit_code == 1
    assert 'dataset ("digits" there, "mnist" here)' in of_others.output


def test_attacks_stay_within_their_ball_and_find_what_is_wrong(example):
    attacks = example("attacks")
    model = torch.nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, -1.0, -1.0]]))
    images, labels = torch.tensor([[0.5, 0.5, 0.5, 0.0]]), torch.tensor([0])
    for eps in (0.01, 0.2):
        for moved in (attacks.fgsm(model, images, labels, eps), attacks.pgd(model, images, labels, eps, seed=0)):
            assert float((moved - images).abs().max()) <= eps + 1e-6
            assert 0 <= float(moved.min())
            assert float(moved.max()) <= 1
            # The loss grows along -, +, -, -; the last pixel is black already.
            expected = torch.tensor([[0.5 - eps, 0.5 + eps, 0.5 - eps, 0.0]])
            torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)


def test_pruning_keeps_what_it_says(example):
    train = sys.modules["train"]
    pruning = example("pruning")
    teacher = train.build_teacher("mlp", 64, 10, seed=0)
    total = pruning.weights_kept(teacher)
    inputs = torch.rand(300, 64, generator=torch.Generator().manual_seed(0))
    for network in (
        pruning.magnitude_pruned(teacher, 0.2, everywhere=True),
        pruning.magnitude_pruned(teacher, 0.2, everywhere=False),
        pruning.refitted_after_pruning(teacher, inputs, 0.2),
        pruning.layerwise_lasso(teacher, inputs, 0.2),
    ):
        assert 0.18 * total <= pruning.weights_kept(network) <= 0.2 * total + 2
    everything = pruning.refitted_after_pruning(teacher, inputs, 0.999)
    with torch.no_grad():
        torch.testing.assert_close(everything(inputs), teacher(inputs), rtol=1e-2, atol=1e-2)
