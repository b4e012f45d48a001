"""Sweeps: many runs as one compiled program, with one copy of the base."""

from lorax_ft.sweeps.devices import one_for_each_core
from lorax_ft.sweeps.directory import Row, best, read_rows, restore
from lorax_ft.sweeps.groups import Group, Run, group_runs
from lorax_ft.sweeps.reports import write_report
from lorax_ft.sweeps.spaces import (
    choice,
    draws,
    grid,
    log_uniform,
    method,
    product,
    uniform,
    zipped,
)
from lorax_ft.sweeps.specification import (
    Halving,
    Search,
    SweepConfig,
    change,
    load_sweep,
    make_runs,
)
from lorax_ft.sweeps.sweep import SweepResult, train

__all__ = [
    "Group",
    "Halving",
    "Row",
    "Run",
    "Search",
    "SweepConfig",
    "SweepResult",
    "best",
    "change",
    "choice",
    "draws",
    "grid",
    "group_runs",
    "load_sweep",
    "log_uniform",
    "make_runs",
    "method",
    "one_for_each_core",
    "product",
    "read_rows",
    "restore",
    "train",
    "uniform",
    "write_report",
    "zipped",
]
