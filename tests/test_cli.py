import importlib.util
import json
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import safetensors.torch
from typer.testing import CliRunner

import idl
from idl import cli, training


def run_demo(*arguments):
    return CliRunner().invoke(cli.application(), ["demo", "--epochs=2", *map(str, arguments)])


def metrics(folder):
    """Return the metrics of a demo without its times."""
    content = json.loads((folder / "metrics.json").read_text())
    for model in ("implicit", "explicit", "sim"):
        del content[model]["seconds"]
    return content


@pytest.fixture
def interrupt_once(monkeypatch):
    """Make Ctrl-C arrive once, when the training of this model reports for the first time."""
    bar = training.progress_line

    def install(name):
        pending = [f"{name} model"]

        @contextmanager
        def interrupting(label, console):
            with bar(label, console) as show:

                def show_and_interrupt(progress):
                    show(progress)
                    if label in pending:
                        pending.remove(label)
                        signal.raise_signal(signal.SIGINT)

                yield show_and_interrupt

        monkeypatch.setattr(training, "progress_line", interrupting)

    return install


def test_the_demo_leaves_a_run_folder_and_ends_with_a_table(tmp_path):
    result = run_demo("--out", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [
        "equilibrium.png",
        "explicit.safetensors",
        "implicit.safetensors",
        "metrics.json",
        "settings.json",
        "sim.safetensors",
        "sparsity.png",
        "training.png",
    ]
    words_of_sim = ("SIM makes", "of its weights", "of the optimum")
    for words in ("test accuracy", "parameters", "9,472", "equilibrium steps", "residual", "||A||_inf", *words_of_sim):
        assert words in result.output
    assert str(tmp_path / "demo") in result.output
    assert all(len(line) <= 80 for line in result.output.splitlines() if str(tmp_path) not in line)
    model = idl.ImplicitModel(hidden_dim=64, input_dim=64, output_dim=10)
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "demo" / "implicit.safetensors"))


@pytest.mark.parametrize("name", ["implicit", "explicit"])
def test_an_interrupted_demo_says_how_to_continue_and_gives_the_same_numbers(tmp_path, interrupt_once, name):
    run_demo("--out", tmp_path / "whole")
    interrupt_once(name)
    result = run_demo("--out", tmp_path / "parts")
    assert result.exit_code == 130
    assert (
        f"To continue where it stopped: python -m idl demo --epochs=2 --seed=0 --out={tmp_path / 'parts'}"
        in result.output
    )
    result = run_demo("--out", tmp_path / "parts")
    assert result.exit_code == 0
    assert "Continuing the interrupted demo" in result.output
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_a_second_demo_replaces_the_first_and_other_settings_start_again(tmp_path, interrupt_once):
    run_demo("--out", tmp_path / "demo")
    first = metrics(tmp_path / "demo")
    interrupt_once("implicit")
    assert run_demo("--out", tmp_path / "demo", "--seed=1").exit_code == 130
    result = run_demo("--out", tmp_path / "demo", "--seed=2")
    assert result.exit_code == 0
    assert "Continuing" not in result.output
    assert metrics(tmp_path / "demo") != first


def test_a_folder_with_other_files_is_refused_in_one_line(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    result = run_demo("--out", tmp_path)
    assert result.exit_code == 1
    assert "files that no run of idl wrote" in result.output
    assert "Traceback" not in result.output


def test_missing_extras_are_one_line_that_says_what_to_install(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("sklearn", "typer") else find_spec(name)
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    # A text as exit status is printed to stderr, and the process exits with 1.
    assert stopped.value.code == (
        "The command idl needs scikit-learn, typer: pip install 'implicit-deep-learning[demo]'"
    )


def test_the_command_line_is_also_a_module_and_imports_no_extra_before_it_runs():
    code = "import idl.cli, sys; print([name for name in idl.cli._EXTRAS if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() in ("[]", "['safetensors']")
    result = subprocess.run([sys.executable, "-m", "idl", "--help"], capture_output=True, text=True, check=True)
    assert "demo" in result.stdout
