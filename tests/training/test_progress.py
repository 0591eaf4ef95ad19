import io

from rich.console import Console

from idl.training import Progress, progress_line


def test_the_line_has_epoch_loss_and_accuracy_in_80_columns():
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with progress_line("implicit model", console) as show:
        show(Progress(step=600, total_steps=1000, epoch=60, epochs=100, loss=12.3456, accuracy=0.99))
    lines = [line for line in console.file.getvalue().replace("\r", "\n").split("\n") if "epoch" in line]
    assert lines
    for line in lines:
        assert "epoch 60/100 loss 12.3 acc 99.0 %" in line and "60%" in line
        assert ":" in line[-6:] and "…" not in line
