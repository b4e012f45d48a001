"""The loop: stopping and going on changes no bit, and a run tells what it does."""

import math
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_ft import trees
from lorax_ft.training.checkpoints import Identity
from lorax_ft.training.locks import run_lock
from lorax_ft.training.loop import TrainConfig, fit
from lorax_ft.training.meter import Meter, count_tokens
from lorax_ft.training.objectives import OBJECTIVES
from lorax_ft.training.optimizers import OptimizerConfig, build_optimizer
from lorax_ft.training.records import open_records, read_records
from lorax_ft.training.sharding import MeshConfig, make_mesh, replicate, shard, shardings_of
from lorax_ft.training.step import make_train_step

IDENTITY = Identity(config="toy", base="none")
STEPS = 12
QUIET = {"progress_bar": False, "tensorboard": False}


class ToyBatches:
    """An endless stream whose n-th batch is a function of n; `at` is called with n before each."""

    def __init__(self, at=lambda n: None, poison=()):
        self.position, self.at, self.poison = 0, at, poison

    def __next__(self):
        n = self.position
        self.at(n)
        self.position += 1
        rng = np.random.default_rng(n)
        weights = np.full(8, np.nan if n in self.poison else 1.0, np.float32)
        return {
            "input_ids": rng.integers(0, 16, (8, 4)).astype(np.int32),
            "attention_mask": (rng.random((8, 4)) < 0.75).astype(np.int32),
            "labels": rng.integers(0, 3, 8).astype(np.int32),
            "weights": weights,
        }

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def apply(params, inputs, key):
    x = params["word"]["embedding"][inputs["input_ids"]].mean(axis=1)
    if key is not None:
        x = x * jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype)
    return x @ params["classifier"]["kernel"]


def run(directory, batches=None, evaluate=None, mesh=None, apply=apply, steps=STEPS, **options):
    """A run of the toy: (result, compiles of its step)."""
    params = {
        "word": {"embedding": jax.random.normal(jax.random.key(1), (16, 6))},
        "classifier": {"kernel": jax.random.normal(jax.random.key(2), (6, 3))},
    }
    params = params if mesh is None else shard(params, mesh)
    train, frozen = trees.partition(params, "classifier/kernel")
    tx = build_optimizer(OptimizerConfig(learning_rate=0.05, warmup_steps=2), steps)
    opt_state, kept = tx.init(train), None
    if mesh is not None:
        opt_state = replicate(opt_state, mesh)
        kept = shardings_of((train, opt_state))
    step = make_train_step(apply, OBJECTIVES["sequence_classification"], tx, out_shardings=kept)
    schedule = {"steps": steps, "checkpoint_every": 3, "log_every": 2}
    result = fit(
        step,
        train,
        opt_state,
        frozen,
        batches or ToyBatches(),
        jax.random.key(3),
        config=TrainConfig(**schedule | QUIET | options),
        directory=directory,
        identity=IDENTITY,
        steps_per_epoch=5,
        evaluate=evaluate,
        mesh=mesh,
    )
    return result, step._cache_size()


def kernel_norm(train, step):
    """An evaluation that tells how the run goes, and when it was asked."""
    return {"norm": float(jnp.linalg.norm(train["classifier"]["kernel"])), "at": step}


def state_bytes(result) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves((result.train, result.opt_state))]


def told(directory) -> list[dict]:
    """What a run recorded, without how fast it was."""
    return [
        {name: value for name, value in record.items() if "per_second" not in name}
        for record in read_records(directory)
    ]


def terminate(step: int):
    """An `at` that sends SIGTERM to this process before the batch of a step."""
    return lambda n: os.kill(os.getpid(), signal.SIGTERM) if n == step else None


@pytest.mark.parametrize("stops", [[4], [0, 1, 6], [3, 11]])
def test_a_run_stopped_by_sigterm_ends_in_the_same_bits(tmp_path, stops):
    whole, _ = run(tmp_path / "whole", evaluate=kernel_norm, eval_every=4)

    seconds = 0.0
    for stop in stops:
        part, _ = run(
            tmp_path / "parts", ToyBatches(terminate(stop)), evaluate=kernel_norm, eval_every=4
        )
        assert (part.outcome, part.progress.step) == ("preempted", stop + 1)
        assert part.progress.seconds > seconds
        seconds = part.progress.seconds
    last, _ = run(tmp_path / "parts", evaluate=kernel_norm, eval_every=4)
    assert last.progress.seconds > seconds  # the sessions before count

    assert last.outcome == whole.outcome == "finished"
    assert state_bytes(last) == state_bytes(whole)
    assert last.progress == whole.progress
    evaluations = [[r for r in told(d) if r["kind"] == "eval"] for d in tmp_path.iterdir()]
    assert evaluations[0] == evaluations[1]
    assert [r["step"] for r in evaluations[0]] == [4, 8, 12]


TOY = """
import sys, time
sys.path.insert(0, {tests!r})
from test_loop import *

def at(n):
    print(n, flush=True)
    time.sleep(0.05)

run(pathlib.Path(sys.argv[1]), ToyBatches(at), evaluate=kernel_norm, eval_every=4)
"""


def test_a_run_killed_at_random_steps_ends_in_the_same_bits(tmp_path):
    whole, _ = run(tmp_path / "whole", evaluate=kernel_norm, eval_every=4)
    code = TOY.format(tests=str(pathlib.Path(__file__).parent))
    command = [sys.executable, "-c", code, str(tmp_path / "killed")]
    # chosen anew each time; what happens at each of them is in `told`
    kills = sorted(random.sample(range(2, STEPS), 2))

    for kill in kills:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if int(line) == kill:
                    process.kill()
        assert process.returncode == -signal.SIGKILL
    last, _ = run(tmp_path / "killed", evaluate=kernel_norm, eval_every=4)

    assert state_bytes(last) == state_bytes(whole), kills
    assert told(tmp_path / "killed") == told(tmp_path / "whole")


def test_a_finished_run_does_nothing_more(tmp_path):
    def refuse(n):
        raise AssertionError("no batch is wanted")

    first, _ = run(tmp_path, evaluate=kernel_norm)
    before = told(tmp_path)

    again, _ = run(tmp_path, ToyBatches(refuse), evaluate=lambda train, step: refuse(step))

    assert again.outcome == "finished"
    assert state_bytes(again) == state_bytes(first)
    assert (again.progress, told(tmp_path)) == (first.progress, before)


def test_the_step_compiles_once_also_after_a_restart(tmp_path):
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(apply, n=2)
    _, first = run(tmp_path, ToyBatches(terminate(5)), apply=counted)

    _, second = run(tmp_path, apply=counted)

    assert first == second == 1


def test_a_run_goes_on_on_another_mesh(tmp_path):
    whole, _ = run(tmp_path / "whole")
    run(tmp_path / "parts", ToyBatches(terminate(5)), mesh=make_mesh(MeshConfig(data=2, fsdp=2)))

    last, compiles = run(tmp_path / "parts", mesh=make_mesh(MeshConfig(data=4, fsdp=2)))

    # sums over devices add in another order
    chex.assert_trees_all_close(
        jax.device_get(last.train), jax.device_get(whole.train), rtol=1e-4, atol=1e-5
    )
    assert compiles == 1


def test_records_hold_each_window_once_with_its_weighted_mean(tmp_path):
    run(tmp_path, evaluate=kernel_norm, eval_every=5, log_every=4, checkpoint_every=0)

    lines = told(tmp_path)

    assert [(r["kind"], r["step"]) for r in lines] == [
        ("train", 4), ("train", 5), ("eval", 5), ("train", 8), ("train", 10), ("eval", 10),
        ("train", 12), ("eval", 12),
    ]  # fmt: skip
    train = [r for r in lines if r["kind"] == "train"]
    assert all(set(r) >= {"loss", "gradient_norm", "learning_rate", "nonfinite"} for r in train)
    assert train[-1]["learning_rate"] == pytest.approx(0.05 * (12 - 11) / 10)


def test_steps_that_are_not_finite_are_skipped_counted_and_told(tmp_path):
    result, _ = run(tmp_path, ToyBatches(poison=(3, 7)))

    assert result.outcome == "finished"
    assert result.progress.nonfinite == 2
    assert [r["nonfinite"] for r in told(tmp_path)] == [0, 0, 1, 1, 2, 2, 2, 2]
    losses = {r["step"]: r["loss"] for r in told(tmp_path)}
    assert losses.pop(4) is None  # the only step of its window was skipped
    assert all(math.isfinite(loss) for loss in losses.values())


def test_too_many_steps_that_are_not_finite_stop_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="3 steps was not finite"):
        run(tmp_path, ToyBatches(poison=range(1, 9)), max_nonfinite=2)

    result, _ = run(tmp_path, ToyBatches(poison=()))  # what was saved before is still good
    assert result.outcome == "finished"


def test_one_that_is_not_finite_at_the_very_end_counts_too(tmp_path):
    with pytest.raises(FloatingPointError, match="By step 12"):
        run(tmp_path, ToyBatches(poison=(11,)), max_nonfinite=0)


def follow(values: dict[int, float]):
    return lambda train, step: {"accuracy": values[step]}


@pytest.mark.parametrize(("metric", "mode", "best"), [
    ("accuracy", None, 4), ("accuracy", "min", 6), ("loss", None, 6), ("loss", "max", 4),
])  # fmt: skip
def test_the_best_evaluation_is_remembered_and_its_checkpoint_kept(tmp_path, metric, mode, best):
    values = {2: 0.5, 4: 0.9, 6: 0.1, 8: 0.4, 10: 0.9, 12: math.nan}

    result, _ = run(
        tmp_path, evaluate=lambda train, step: {metric: values[step]}, eval_every=2,
        best_metric=metric, best_mode=mode, keep_last=1,
    )  # fmt: skip

    assert (result.progress.best_step, result.progress.best_value) == (best, values[best])
    kept = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert kept == {str(best), "12"}


def test_patience_at_an_end_stops_the_run_early_and_for_good(tmp_path):
    values = dict.fromkeys(range(2, 13, 2), 0.5)
    options = {"eval_every": 2, "best_metric": "accuracy", "patience": 2}

    first, _ = run(tmp_path, evaluate=follow(values), **options)
    again, _ = run(tmp_path, evaluate=follow(values), **options)

    assert first.outcome == again.outcome == "stopped_early"
    assert first.progress.step == again.progress.step == 6


@pytest.mark.parametrize(("every", "steps"), [(None, [5, 10, 12]), (0, [12]), (6, [6, 12])])
def test_evaluations_come_every_epoch_at_the_end_or_every_so_many_steps(tmp_path, every, steps):
    run(tmp_path, evaluate=kernel_norm, eval_every=every)

    assert [r["at"] for r in told(tmp_path) if r["kind"] == "eval"] == steps


def test_a_metric_that_the_evaluation_does_not_return_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"'acuracy', but the evaluation returned \['accuracy'\]"):
        run(tmp_path, evaluate=follow({5: 1.0}), best_metric="acuracy")


def test_a_best_metric_without_an_evaluation_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no evaluation"):
        run(tmp_path, best_metric="accuracy")


def test_batches_that_end_too_early_are_an_error(tmp_path):
    def end(n):
        if n == 7:
            raise StopIteration

    with pytest.raises(ValueError, match="ended after 7 of 12 steps"):
        run(tmp_path, ToyBatches(end))


def test_two_runs_in_one_directory_are_an_error_naming_the_first(tmp_path):
    with run_lock(tmp_path), pytest.raises(RuntimeError, match=f"'pid': {os.getpid()}"):
        run(tmp_path)

    assert run(tmp_path)[0].outcome == "finished"


def test_the_bar_shows_loss_speed_and_evaluations(tmp_path, capsys):
    run(tmp_path, evaluate=kernel_norm, progress_bar=True)

    captured = capsys.readouterr()

    assert re.search(r"12/12 .*loss \d\.\d{4}, [1-9][\d,]* tokens/s", captured.err)
    assert re.search(r"step 5: norm \d\.\d{4}", captured.out)


def test_the_same_numbers_go_to_tensorboard(tmp_path):
    run(tmp_path, evaluate=kernel_norm, tensorboard=True)

    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()

    assert b"train/loss" in content
    assert b"eval/norm" in content


def test_records_after_the_restored_step_and_torn_lines_are_cut_away(tmp_path):
    with open_records(tmp_path, None, tensorboard=False) as write:
        for step in (1, 2, 3):
            write("train", step, {"loss": math.nan, "other": None})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "ki')

    with open_records(tmp_path, 2, tensorboard=False) as write:
        write("train", 3, {"loss": 1.0})

    assert [r["step"] for r in read_records(tmp_path)] == [1, 2, 3]
    assert read_records(tmp_path)[0] == {"step": 1, "kind": "train", "loss": None, "other": None}


def test_speeds_count_real_and_padded_tokens_and_leave_compiling_out(monkeypatch):
    clock = iter(np.arange(100.0))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    batch = ToyBatches().__next__()
    batch["weights"][-1] = 0.0
    real = int(batch["attention_mask"][:-1].sum())
    meter = Meter(peak_flops=1000.0)
    step = jax.jit(lambda x: (x, x, {"loss": x.sum(), "weight": 1.0, "finite": 1.0}))
    product = jax.jit(lambda x: step(x @ x))

    assert count_tokens(batch) == (real, 32)
    for _ in range(3):
        meter.run(product, (jnp.ones((4, 4)),), batch)
    # the clock is read at each of three starts, once when compiling ends, and at `close`
    values = meter.close()

    padded = values["padded_tokens_per_second"]
    assert values["tokens_per_second"] == pytest.approx(padded * real / 32)
    assert padded == pytest.approx(2 * 32 / 3)
    assert values["model_flops_utilisation"] == pytest.approx(2 * 128 / 3 / 1000)


def test_a_device_of_unknown_peak_gives_no_utilisation(tmp_path):
    run(tmp_path)

    assert not any("utilisation" in name for r in told(tmp_path) for name in r)


@pytest.mark.parametrize(("field", "value"), [
    ("epochs", 0.0), ("steps", 0), ("accumulation", 0), ("log_every", 0), ("keep_last", 0),
    ("keep_best", -1), ("max_nonfinite", -1), ("eval_every", -1), ("checkpoint_every", -2),
    ("best_mode", "best"), ("patience", 0),
])  # fmt: skip
def test_bad_fields_are_named_with_their_values(field, value):
    with pytest.raises(ValueError, match=f"TrainConfig.{field} .*{value}"):
        TrainConfig(**{field: value})


@pytest.mark.parametrize(("fields", "message"), [
    ({"patience": 2}, "patience needs best_metric"),
    ({"best_metric": "accuracy", "keep_best": 0}, "needs keep_best"),
])  # fmt: skip
def test_fields_that_contradict_each_other_are_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)


def test_what_only_a_run_needs_is_imported_by_the_run():
    code = (
        "import sys, lorax_ft.training\n"
        "print({'orbax', 'tensorboardX', 'tqdm', 'flax', 'grain'} & set(sys.modules))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(("config", "steps"), [
    (TrainConfig(epochs=3), 30), (TrainConfig(epochs=0.25), 3), (TrainConfig(steps=7), 7),
    (TrainConfig(epochs=0.01), 1),
])  # fmt: skip
def test_epochs_are_rounded_up_to_steps(config, steps):
    assert config.total_steps(steps_per_epoch=10) == steps
