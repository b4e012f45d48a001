"""An experiment: from a config to a trained model in a run directory."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from lorax_ft import interop, methods, plots, prediction, reports, runs, training, trees
from lorax_ft.adapted import (
    DECOMPOSITIONS,
    Adapted,
    find_path,
    load_adapted,
    load_shapes,
    make_outputs,
)
from lorax_ft.config import ExperimentConfig
from lorax_ft.data import (
    Dataset,
    TextClassification,
    Tokenizer,
    TrainBatches,
    check_fits,
    evaluation_batches,
    label_texts,
    load_dataset,
    load_tokenizer,
    tfidf_baseline,
)
from lorax_ft.leaves import dense
from lorax_ft.memory import check_kept, check_step, place
from lorax_ft.training import checkpoints, loop, records

PyTree = Any
STEPS = 1_000_000  # of a run whose length its data decide: no shape depends on it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """All that a config stands for, ready to train."""

    config: ExperimentConfig
    tokenizer: Tokenizer
    dataset: Dataset
    adapted: Adapted
    train: PyTree
    frozen: PyTree
    eval_step: Callable[..., Any]


def prepare(config: ExperimentConfig) -> Experiment:
    """Reads tokenizer, data and model, adds the methods, and parts what is trained from the rest.

    Raises ValueError, TypeError or OSError, naming file, row, key or path, for what is wrong.
    """
    tokenizer, dataset = load_data(config)
    adapted = load_adapted(config, dataset.task, dataset.label_names)
    return assemble(config, tokenizer, dataset, adapted)


def load_data(config: ExperimentConfig) -> tuple[Tokenizer, Dataset]:
    """The tokenizer of a config and its data. Raises as `prepare` does."""
    tokenizer = load_tokenizer(find_path(config.model.tokenizer or config.model.path))
    return tokenizer, load_dataset(config.data, tokenizer)


def assemble(
    config: ExperimentConfig, tokenizer: Tokenizer, dataset: Dataset, adapted: Adapted
) -> Experiment:
    """The experiment of parts that are there. Raises ValueError where data and model do not fit."""
    limits = adapted.model.config
    check_fits(
        dataset,
        vocabulary_size=limits.vocab_size,
        positions=limits.max_length,
        decoder_start_id=getattr(limits, "decoder_start_token_id", None),
    )
    train, frozen = trees.partition(adapted.params, adapted.trainable)
    return Experiment(
        config=config,
        tokenizer=tokenizer,
        dataset=dataset,
        adapted=adapted,
        train=train,
        frozen=frozen,
        eval_step=training.make_eval_step(
            make_outputs(adapted.model, adapted.mesh, right_padded=True),
            training.OBJECTIVES[dataset.task],
        ),
    )


def train(
    config: ExperimentConfig, run_dir: str | pathlib.Path, *, command: str = ""
) -> dict[str, Any]:
    """Trains, evaluates and writes all that `runs` names; goes on where a stopped run was.

    `command` is what the exported adapter's card says that it was made by. Prints what is trained
    and what came of it, and returns what results.json holds. A run that is finished is not run
    again. One that SIGTERM ended has saved its state, and answers its step. Of several processes
    (`config.processes`) the first writes, speaks and returns results; the others return {}.
    """
    with training.together(config.processes):
        config = dataclasses.replace(config, processes=None)
        return _train(config, pathlib.Path(run_dir), command)


def _train(config: ExperimentConfig, directory: pathlib.Path, command: str) -> dict[str, Any]:
    runs.check_run(directory, config)
    if results := runs.read_results(directory):
        print(f"{directory} is finished; another --run_dir trains anew.")
        print(reports.results_table(results))
        return results
    if (idle := training.idle_devices(config.mesh)) and training.is_first():
        print(f"WARNING: {idle}", file=sys.stderr)
    tokenizer, dataset = load_data(config)
    _check_room(config, dataset)
    adapted = load_adapted(config, dataset.task, dataset.label_names)
    experiment = assemble(config, tokenizer, dataset, adapted)
    identity, started = _identity(experiment), runs.is_started(directory)
    training.check_same(config=identity.config, base_weights=identity.base, run_directory=started)
    counts = trees.count(adapted.params, adapted.trainable)
    names = method_names(config)
    print(reports.overview(dataset, counts, model=config.model.path, methods=names))
    with contextlib.closing(_train_batches(experiment)) as batches:
        start = _start(experiment, batches)
        print(f"memory   {_memory(experiment, start)}")
        if training.is_first():
            runs.start_run(directory, config)  # only now: bad input leaves no run behind
        training.check_shared(directory / runs.CONFIG)
        wanted = config.baseline and training.is_first()
        baseline = text_baseline(config, dataset) if wanted else None
        result = _fit(experiment, start, directory)
    step = result.progress.step
    if result.outcome == "preempted":
        print(f"Stopped after step {step} and saved; the same command goes on from there.")
        return {"outcome": result.outcome, "step": step}

    train = _best(experiment, directory, result) if config.train.best_metric else result.train
    results = finish(
        experiment,
        directory,
        train,
        outcome=result.outcome,
        progress=result.progress,
        evaluations={
            part: evaluate_part(experiment, train, part) for part in evaluated_parts(experiment)
        },
        baseline=baseline,
        command=command,
    )
    if results:
        print(f"{reports.results_table(results)}\nAll of it is in {directory}.")
    return results


def evaluated_parts(experiment: Experiment) -> list[str]:
    """The splits that a finished run is evaluated on."""
    return [part for part in ("validation", "test") if getattr(experiment.dataset, part)]


def finish(
    experiment: Experiment,
    directory: pathlib.Path,
    train: PyTree,
    *,
    outcome: str,
    progress: training.Progress,
    evaluations: Mapping[str, prediction.Evaluation],
    baseline: float | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Writes what a run leaves behind, results.json last, and returns what that holds.

    `train` is the half that was trained, as it is to be kept. `experiment.adapted` need not hold
    its arrays any more: only their structure is read. `command` is what the exported adapter's card
    says that it was made by. All processes of a run must call it; those that are not the first
    write nothing, and return {}.
    """
    metrics = {part: found.metrics for part, found in evaluations.items()}
    halves = training.gather((train, experiment.frozen))
    if halves is None:
        return {}
    train, frozen = halves
    counts = trees.count(trees.combine(train, frozen), experiment.adapted.trainable)
    _save(experiment, directory, train, frozen, metrics, command)
    results = {
        "outcome": outcome,
        "step": progress.step,
        "metrics": metrics,
        "warnings": [found.warning for found in evaluations.values() if found.warning],
        "baseline": baseline,
        "parameters": dataclasses.asdict(counts),
        "seconds": progress.seconds,
        "peak_memory_bytes": reports.peak_memory(),
    }
    runs.write_results(directory, results)
    return results


def describe(config: ExperimentConfig) -> str:
    """Tables of a config's parameters: how each is held and trained, and how the model uses it."""
    adapted = prepare(config).adapted
    return (
        f"{trees.summary(adapted.params, adapted.trainable)}\n\n{reports.uses_table(adapted.uses)}"
    )


def evaluate_part(experiment: Experiment, train: PyTree, part: str) -> prediction.Evaluation:
    """Metrics of a split; a model that predicts one class only is warned of on the spot."""
    dataset, adapted = experiment.dataset, experiment.adapted
    share = training.share_of(adapted.mesh)
    found = prediction.evaluate(
        lambda batch: experiment.eval_step(train, experiment.frozen, batch),
        evaluation_batches(
            dataset.part(part),
            experiment.config.data.loader,
            pad_id=dataset.pad_id,
            process_index=share.index,
            process_count=share.count,
        ),
        task=dataset.task,
        label_names=dataset.label_names,
        mesh=adapted.mesh,
    )
    if found.warning and training.is_first():
        print(f"\nWARNING ({part}): {found.warning}", file=sys.stderr)
    return found


def method_names(config: ExperimentConfig) -> str:
    """The methods of a config in a few words: `lora on nf4`."""
    names = [name for name in methods.METHODS if getattr(config, name) is not None]
    base = "" if config.quantization is None else f" on {config.quantization.kind}"
    return " + ".join(names or ["trainable"]) + base


def training_key(seed: int) -> jax.Array:
    """The key that a run folds its steps into."""
    return jax.random.fold_in(jax.random.key(seed), 2)


def make_optimizer(
    config: ExperimentConfig, total_steps: int | None
) -> optax.GradientTransformation:
    """The optimizer of a run of so many steps; where they are not known, for its shapes alone."""
    total_steps = STEPS if total_steps is None else total_steps
    tx = training.build_optimizer(config.optimizer, total_steps)
    if config.adalora is not None:
        tx = training.allocate_budget(tx, config.adalora, total_steps)
    return tx


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Start:
    """What a run's first step is made of. The step takes `train` over: it is gone after it."""

    step: Callable[..., Any]
    train: PyTree
    opt_state: PyTree
    batches: TrainBatches


def _train_batches(experiment: Experiment) -> TrainBatches:
    """The training batches, of each of which this process loads its share."""
    config, share = experiment.config, training.share_of(experiment.adapted.mesh)
    return TrainBatches(
        experiment.dataset.train,
        config.data.loader,
        pad_id=experiment.dataset.pad_id,
        seed=config.seed,
        process_index=share.index,
        process_count=share.count,
    )


def _start(experiment: Experiment, batches: TrainBatches) -> _Start:
    config, adapted = experiment.config, experiment.adapted
    tx = make_optimizer(config, config.train.total_steps(batches.steps_per_epoch))
    train, shardings = experiment.train, None
    opt_state = training.start_optimizer(tx, train, adapted.mesh)
    # Bound to their devices, as a checkpoint's arrays are: a run that goes on has the same program.
    train, opt_state = (jax.device_put(x, training.shardings_of(x)) for x in (train, opt_state))
    if adapted.mesh is not None or config.optimizer.paged:
        shardings = (training.shardings_of(train), training.shardings_of(opt_state))
    step = training.make_train_step(
        make_outputs(adapted.model, adapted.mesh, right_padded=True),
        training.OBJECTIVES[experiment.dataset.task],
        tx,
        accumulation=config.train.accumulation,
        out_shardings=shardings,
    )
    return _Start(step=step, train=train, opt_state=opt_state, batches=batches)


def _check_room(config: ExperimentConfig, dataset: Dataset) -> None:
    """Raises ValueError, with the numbers, where weights and states, of which none is there yet,
    do not fit."""
    try:
        shapes = load_shapes(config, dataset.task, dataset.label_names)
    except ValueError:
        return  # of weights in few bits, whose config.json tells too little; else loading says why
    tx = make_optimizer(config, config.train.steps)
    check_kept(place(shapes, tx, training.make_mesh(config.mesh)))


def _memory(experiment: Experiment, start: _Start) -> str:
    """A line on what the step takes of memory. Raises ValueError where it does not fit."""
    mesh, batch = experiment.adapted.mesh, start.batches.largest()
    key = jax.random.fold_in(training_key(experiment.config.seed), 0)
    if mesh is not None:
        batch, key = training.shard_batch(batch, mesh), training.replicate(key, mesh)
    return check_step(start.step, (start.train, start.opt_state, experiment.frozen, batch, key))


def _fit(experiment: Experiment, start: _Start, directory: pathlib.Path) -> training.FitResult:
    return training.fit(
        start.step,
        start.train,
        start.opt_state,
        experiment.frozen,
        start.batches,
        training_key(experiment.config.seed),
        config=experiment.config.train,
        directory=directory,
        identity=_identity(experiment),
        steps_per_epoch=start.batches.steps_per_epoch,
        evaluate=_validation(experiment),
        mesh=experiment.adapted.mesh,
    )


def _validation(experiment: Experiment) -> loop.Evaluate | None:
    """What the loop evaluates as it goes; None where nothing is held out for that."""
    if not experiment.dataset.validation:
        return None
    return lambda train, step: evaluate_part(experiment, train, "validation").metrics


def _identity(experiment: Experiment) -> training.Identity:
    return training.Identity(config=runs.identity(experiment.config), base=experiment.adapted.base)


def _best(experiment: Experiment, directory: pathlib.Path, result: training.FitResult) -> PyTree:
    """The trainable half as it was when `best_metric` was best."""
    step = result.progress.best_step
    if step is None or step == result.progress.step:
        return result.train
    identity = _identity(experiment)
    with training.open_store(directory / "checkpoints", identity, read_only=True) as store:
        snapshot = checkpoints.restore(store, result.train, step=step)
    assert snapshot is not None  # a given step is read or raises
    return snapshot.train


def _save(
    experiment: Experiment,
    directory: pathlib.Path,
    train: PyTree,
    frozen: PyTree,
    metrics: dict[str, dict[str, float]],
    command: str,
) -> None:
    """Writes the adapter and the picture of the run."""
    dataset, adapted = experiment.dataset, experiment.adapted
    record = runs.AdapterRecord(
        config=experiment.config,
        task=dataset.task,
        label_names=dataset.label_names,
        base=adapted.base,
    )
    runs.save_adapter(directory / runs.ADAPTER, train, record)
    card = interop.ModelCard(data=_data(experiment), metrics=metrics, command=command)
    _export(experiment, directory / runs.PEFT, trees.combine(train, frozen), card)
    plots.plot_run(
        records.read_records(directory),
        directory / "loss.png",
        title=f"{directory.name}: {method_names(experiment.config)}",
        metric=experiment.config.train.best_metric or "accuracy",
    )


def _export(
    experiment: Experiment, directory: pathlib.Path, params: PyTree, card: interop.ModelCard
) -> None:
    """Writes the adapter as a PEFT directory, where PEFT has a word for it."""
    config = experiment.config
    low_rank = [section for section in (config.lora, config.adalora) if section is not None]
    params = methods.as_lora(params)
    decomposed = config.lora is not None and config.lora.initialization in DECOMPOSITIONS
    if decomposed or not interop.can_save(params):  # a decomposition changes the base
        return
    shutil.rmtree(directory, ignore_errors=True)  # of a session that broke off
    model, parameters = experiment.adapted.model, trees.flatten(params)
    # what started from chance is in no base: it goes along whole, what was learnt on it merged
    new = experiment.adapted.head
    params = trees.with_fields(params, {path: dense(parameters[path]) for path in new})
    interop.save_peft(
        directory,
        model,
        params,
        (*experiment.adapted.trainable, *map(re.escape, new)),
        base_name=config.model.path,
        dropout=max((section.dropout for section in low_rank), default=0.0),
        rslora=config.lora is not None and config.lora.rslora,
        card=card,
    )


def _data(experiment: Experiment) -> str:
    """What a run was trained on, in a line: where it is from, and how much of it."""
    dataset, source = experiment.dataset, experiment.config.data.source
    subset = f" ({source.subset})" if source.subset else ""
    origin = f"{source.hub}{subset}" if source.hub else pathlib.Path(source.train).name
    counts = (
        f"{len(examples):,} {part}"
        for part in ("train", "validation", "test")
        if (examples := getattr(dataset, part))
    )
    return f"{origin}: {', '.join(counts)} examples"


def text_baseline(config: ExperimentConfig, dataset: Dataset) -> float | None:
    """Test accuracy of TF-IDF with logistic regression, for a classification of single texts."""
    task, tables = config.data.task, dataset.tables
    if not isinstance(task, TextClassification) or task.text_pair or "test" not in tables:
        return None
    texts = {
        part: (tables[part].texts(task.text, field="task.text"), label_texts(tables[part], task))
        for part in ("train", "test")
    }
    return tfidf_baseline(texts["train"], texts["test"])
