"""A search: runs that an Optuna study proposes and prunes; the study outlives the process."""

from __future__ import annotations

import collections
import json
import math
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from lorax_ft import runs
from lorax_ft.config import ExperimentConfig
from lorax_ft.sweeps.directory import GROUPS, RUNS, describe, differences
from lorax_ft.sweeps.groups import Run
from lorax_ft.sweeps.queue import metric_of
from lorax_ft.sweeps.search.fields import Field
from lorax_ft.sweeps.search.storages import open_study
from lorax_ft.sweeps.search.strategies import load_optuna, make_pruner, make_sampler, suggest
from lorax_ft.sweeps.specification import Search, SweepConfig, make_run

NAME = "run"  # of a trial's attribute with the name of its run
SEARCH = "search"  # of a study's attribute with what the search is


class StudyQueue:
    """The runs of a study, proposed as slots become free."""

    def __init__(
        self,
        field: Field,
        config: ExperimentConfig,
        sweep: SweepConfig,
        directory: pathlib.Path,
        *,
        say: Callable[[str], None] = print,
    ):
        assert sweep.search is not None
        self._field, self._config, self._sweep, self._say = field, config, sweep, say
        self._search: Search = sweep.search
        self._metric = sweep.metric.partition(".")
        self._study = _open_study(field, config, sweep, directory)
        self._trials: dict[str, Any] = {}
        self._runs: dict[str, Run] = {}
        self._waiting: collections.deque[Run] = collections.deque()
        self._take_up(directory)

    @property
    def left(self) -> int:
        """How many runs are still to end."""
        return len(self._waiting) + self._field.trials - len(self._study.trials)

    def next(self) -> Run | None:
        if self._waiting:
            return self._waiting.popleft()
        while (number := len(self._study.trials)) < self._field.trials:
            self._study.sampler = self._sampler(number)
            if run := self._run(self._study.ask()):
                return run
        return None

    def known(self, name: str) -> Run:
        return self._runs[name]

    def resumed(self, run: Run) -> None:
        self._waiting = collections.deque(r for r in self._waiting if r.name != run.name)

    def asks(self, run: Run, step: int) -> bool:
        del run, step
        return False

    def expect(self, first: int | None, last: int) -> None:
        if self._search.pruner is not None:
            assert first is not None
            self._study.pruner = make_pruner(self._search, first=first, last=last)

    def report(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        trial, (part, _, name) = self._trials[run.name], self._metric
        if part == "validation":
            seen = self._study.trials[trial.number].intermediate_values
            if step not in seen:  # a run that was gone on with says some things twice
                value = metric_of(metrics, name)
                trial.report(value if math.isfinite(value) else math.nan, step)  # NaN is the worst

    def prunes(self, run: Run, step: int) -> bool:
        del step
        if self._search.pruner is None:
            return False
        with warnings.catch_warnings():  # NumPy's, where Optuna takes a median of NaN alone
            warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
            return self._trials[run.name].should_prune()

    def finish(self, run: Run, results: Mapping[str, Any]) -> None:
        self._tell(self._trials[run.name], results)

    def _tell(self, trial: Any, results: Mapping[str, Any]) -> None:
        part, _, name = self._metric
        value = results["metrics"].get(part, {}).get(name)
        if results["outcome"] == "pruned":
            self._end(trial, state=_states().PRUNED)
        elif value is None or not math.isfinite(value):
            self._end(trial, state=_states().FAIL)
        else:
            self._end(trial, value)

    def _end(self, trial: Any, value: float | None = None, *, state: Any = None) -> None:
        # A grid's sampler, told of its last trial, would end Optuna's own loop, and there is none.
        self._study.sampler = load_optuna().samplers.RandomSampler()
        self._study.tell(trial, value, state=state)

    def _take_up(self, directory: pathlib.Path) -> None:
        """Takes up the trials of a process that ended: those of finished runs are told of."""
        from optuna.trial import Trial

        for frozen in self._study.get_trials(states=(_states().RUNNING,)):
            self._study.sampler = self._sampler(frozen.number)  # of what it did not draw yet
            trial = Trial(self._study, frozen._trial_id)  # Optuna has no other way to go on
            if (run := self._run(trial)) is None:
                continue
            if results := runs.read_results(directory / RUNS / run.name):
                self._tell(trial, results)
            else:
                self._waiting.append(run)

    def _sampler(self, number: int) -> Any:
        field = self._field
        return make_sampler(self._search, field.space, field=field.number, number=number)

    def _run(self, trial: Any) -> Run | None:
        """The run of a trial; None where its values do not go together, which ends it."""
        drawn = {key: suggest(trial, key, item) for key, item in self._field.space.items()}
        number, changes = self._field.first + trial.number, {**self._field.changes, **drawn}
        try:
            run = make_run(self._config, self._sweep, number, changes)
        except ValueError as error:
            self._say(f"Trial {trial.number} cannot be: {error}")
            self._end(trial, state=_states().FAIL)
            return None
        trial.set_user_attr(NAME, run.name)
        self._trials[run.name], self._runs[run.name] = trial, run
        return run


def _open_study(
    field: Field, config: ExperimentConfig, sweep: SweepConfig, directory: pathlib.Path
) -> Any:
    """The study of a field, made or gone on with.

    Raises as `open_study` does, and ValueError where the study there is of another search.
    """
    assert sweep.search is not None
    study = open_study(
        sweep.search.storage,
        f"{directory.name}-{field.group.name}",
        directory.absolute() / GROUPS / field.group.name,
        direction="maximize" if sweep.sign > 0 else "minimize",
    )
    given, saved = describe(config, sweep), study.user_attrs.get(SEARCH)
    if saved is None:
        study.set_user_attr(SEARCH, json.dumps(given))
    elif lines := differences(json.loads(saved), given):
        raise ValueError(
            f"The study {study.study_name!r} was made by another config or sweep file:\n{lines}\n"
            "Give another --sweep_dir, or the same files to go on with that search."
        )
    return study


def _states() -> Any:
    return load_optuna().trial.TrialState
