"""What the demo and every example share: training, its run folder, its checkpoint, its pictures.

The models know nothing of this room, and importing `idl` does not import it. Nothing in here prints, except
:func:`progress_line` to the console that it is given.
"""

from idl.atomic import write_json
from idl.training.baseline import ExplicitMLP
from idl.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from idl.training.diagnostics import EquilibriumReport, picard_residuals, report_equilibrium
from idl.training.experiment import Run, exit_with_advice, finished_run, usable_device
from idl.training.figures import draw_equilibrium, draw_forecast, draw_sparsity, draw_tradeoff, draw_training
from idl.training.interruption import stop_on_interrupt
from idl.training.labelled import Labelled
from idl.training.progress import progress_line
from idl.training.runs import RunFolder, save_weights, settings_that_differ
from idl.training.schedule import OneCycle
from idl.training.supervised import EpochRecord, History, Progress, Recipe, evaluate, fit_supervised
from idl.training.tables import spread

__all__ = [
    "CheckpointError",
    "EpochRecord",
    "EquilibriumReport",
    "ExplicitMLP",
    "History",
    "Labelled",
    "OneCycle",
    "Progress",
    "Recipe",
    "Run",
    "RunFolder",
    "draw_equilibrium",
    "draw_forecast",
    "draw_sparsity",
    "draw_tradeoff",
    "draw_training",
    "evaluate",
    "exit_with_advice",
    "finished_run",
    "fit_supervised",
    "load_checkpoint",
    "picard_residuals",
    "progress_line",
    "report_equilibrium",
    "save_checkpoint",
    "save_weights",
    "settings_that_differ",
    "spread",
    "stop_on_interrupt",
    "usable_device",
    "write_json",
]
