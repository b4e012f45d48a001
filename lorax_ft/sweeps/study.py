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
from lorax_ft.sweeps.directory import GROUPS, RUNS
from lorax_ft.sweeps.fields import Field
from lorax_ft.sweeps.groups import Run
from lorax_ft.sweeps.queue import metric_of
from lorax_ft.sweeps.spaces import Choice, Distribution
from lorax_ft.sweeps.specification import Search, SweepConfig, make_run

NAME = "run"  # of a trial's attribute with the name of its run


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
        self._study = _open_study(field, sweep, directory)
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
            self._study.sampler = _sampler(self._search, self._field.number, number)
            trial = self._study.ask()
            try:
                run = self._run(trial)
            except ValueError as error:  # the draw's values do not go together
                self._say(f"Trial {trial.number} cannot be: {error}")
                self._study.tell(trial, state=_states().FAIL)
                continue
            trial.set_user_attr(NAME, run.name)
            return self._know(trial, run)
        return None

    def known(self, name: str) -> Run:
        return self._runs[name]

    def resumed(self, run: Run) -> None:
        self._waiting = collections.deque(r for r in self._waiting if r.name != run.name)

    def asks(self, run: Run, step: int) -> bool:
        del run, step
        return False

    def report(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        trial, (part, _, name) = self._trials[run.name], self._metric
        if part == "validation":
            seen = self._study.trials[trial.number].intermediate_values
            if step not in seen:  # a run that was gone on with says some things twice
                trial.report(metric_of(metrics, name), step)

    def prunes(self, run: Run, step: int) -> bool:
        del step
        return self._search.pruner is not None and self._trials[run.name].should_prune()

    def finish(self, run: Run, results: Mapping[str, Any]) -> None:
        self._tell(self._trials[run.name], results)

    def _tell(self, trial: Any, results: Mapping[str, Any]) -> None:
        part, _, name = self._metric
        value = results["metrics"].get(part, {}).get(name)
        if results["outcome"] == "pruned":
            self._study.tell(trial, state=_states().PRUNED)
        elif value is None or not math.isfinite(value):
            self._study.tell(trial, state=_states().FAIL)
        else:
            self._study.tell(trial, value)

    def _take_up(self, directory: pathlib.Path) -> None:
        """Takes up the trials of a process that ended: those of finished runs are told of."""
        from optuna.trial import Trial

        for frozen in self._study.get_trials(states=(_states().RUNNING,)):
            trial = Trial(self._study, frozen._trial_id)  # Optuna has no other way to go on
            run = self._know(trial, self._run(trial))
            trial.set_user_attr(NAME, run.name)
            if results := runs.read_results(directory / RUNS / run.name):
                self._tell(trial, results)
            else:
                self._waiting.append(run)

    def _run(self, trial: Any) -> Run:
        drawn = {key: _suggest(trial, key, item) for key, item in self._field.space.items()}
        number, changes = self._field.first + trial.number, {**self._field.changes, **drawn}
        return make_run(self._config, self._sweep, number, changes)

    def _know(self, trial: Any, run: Run) -> Run:
        self._trials[run.name], self._runs[run.name] = trial, run
        return run


def _open_study(field: Field, sweep: SweepConfig, directory: pathlib.Path) -> Any:
    """The study of a field, made or gone on with.

    Raises ImportError without Optuna, OSError where the storage cannot be reached, ValueError where
    the study there is of another search.
    """
    optuna = _optuna()
    search = sweep.search
    assert search is not None
    # A file for each group: no two workers write to one, which not every shared storage allows.
    folder = directory.absolute() / GROUPS / field.group.name
    url = search.storage or f"sqlite:///{folder / 'study.db'}"
    if search.storage is None:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        study = optuna.create_study(
            study_name=f"{directory.name}-{field.group.name}",
            storage=url,
            direction="maximize" if sweep.sign > 0 else "minimize",
            pruner=_pruner(search),
            load_if_exists=True,
        )
    except ValueError as error:
        raise ValueError(f"Search.storage = {url!r}: {error}") from error
    except Exception as error:
        raise OSError(f"Search.storage: the study at {url} cannot be reached: {error}") from error
    content = {"space": repr(dict(field.space)), "changes": repr(dict(field.changes))}
    text = json.dumps({**content, "metric": sweep.metric, "trials": field.trials})
    saved = study.user_attrs.get("search")
    if saved is None:
        study.set_user_attr("search", text)
    elif saved != text:
        raise ValueError(
            f"Search.storage: the study {study.study_name!r} at {url} was made by another sweep "
            f"file:\n  {saved} there,\n  {text} here.\nGive another --sweep_dir or storage."
        )
    return study


def _sampler(search: Search, field: int, number: int) -> Any:
    """The sampler of one trial, whose draws depend on its number and on what is known by then."""
    samplers = _optuna().samplers
    seed = (search.seed * 1009 + field) * 100003 + number
    if search.sampler == "random":
        return samplers.RandomSampler(seed=seed % 2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls constant_liar experimental
        return samplers.TPESampler(seed=seed % 2**32, constant_liar=True)


def _pruner(search: Search) -> Any:
    pruners = _optuna().pruners
    table: dict[str | None, Callable[[], Any]] = {
        None: pruners.NopPruner,
        "median": pruners.MedianPruner,
        "halving": pruners.SuccessiveHalvingPruner,
        "hyperband": pruners.HyperbandPruner,
    }
    return table[search.pruner]()


def _suggest(trial: Any, key: str, item: Distribution) -> Any:
    if not isinstance(item, Choice):
        return trial.suggest_float(key, item.low, item.high, log=item.log)
    # by number, for a value may be what no study can hold, such as a method's section
    return item.values[trial.suggest_categorical(key, list(range(len(item.values))))]


def _states() -> Any:
    return _optuna().trial.TrialState


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ImportError(
            "A search needs Optuna: pip install 'lorax_ft[search]'. Sweeps that list their runs do "
            "without."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
