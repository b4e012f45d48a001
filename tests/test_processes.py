"""Processes: several compute what one does, stop together, and say so when one of them is lost."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

from lorax_ft import experiment, sweeps
from lorax_ft.config import ExperimentConfig, parse
from lorax_ft.runs import check_run, identity, start_run
from lorax_ft.training import processes
from lorax_ft.training.processes import ProcessesConfig, together
from lorax_ft.training.records import read_records
from lorax_ft.training.sharding import MeshConfig
from lorax_ft.training.shares import find_share
from tests import tiny
from tests.test_loop import ToyBatches, kernel_norm, run, terminate
from tests.test_sweep import config_of

# Sums over devices and processes are added in another order than on one device.
NEAR = {"rtol": 1e-4, "atol": 1e-5}
ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = {"model": {"path": "m"}, "data": {"source": {"train": "t.csv"}, "task": {}}, "lora": {}}
# Of two processes with two devices each, the second dies in the last of several runs; of four with
# a device each, the second is terminated in their only one.
PROCESS = """
import os, sys
directory, port, index, count = *sys.argv[1:3], *map(int, sys.argv[3:])
from tests.compilers import xla_flags
os.environ["XLA_FLAGS"] = xla_flags(devices=4 // count)
from tests.test_loop import *
from lorax_ft.training.processes import ProcessesConfig, check_same, check_shared, leave, together
from lorax_ft.training.shares import share_of

class Rows(ToyBatches):
    def __init__(self, mesh, at):
        super().__init__(at)
        self.share = share_of(mesh)

    def __next__(self):
        size = 8 // self.share.count
        first = self.share.index * size
        return {name: x[first : first + size] for name, x in super().__next__().items()}

def run_on(name, at=lambda n: None, **axes):
    mesh = make_mesh(MeshConfig(**axes))
    result, compiles = run(
        directory + "/" + name, Rows(mesh, at), mesh=mesh, evaluate=kernel_norm, eval_every=4
    )
    print("RESULT", name, result.outcome, result.progress.step, compiles, file=sys.stderr)

def killed(n):
    if n == 7 and index == 1:
        os.kill(os.getpid(), signal.SIGKILL)

def terminated(n):
    if n == 7 and index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.7 * (n > 7))  # so that all hear of the signal before the run ends

config = ProcessesConfig(
    coordinator="localhost:" + port, count=count, index=index, lost_timeout=20, start_timeout=200
)
try:
    with together(config):
        print("SPOKEN", flush=True)
        if count == 4:
            run_on("four", terminated, data=2, fsdp=2)
            sys.exit()
        own = pathlib.Path(directory) / f"seen_by_{index}_alone"
        own.touch() if index == 0 else None
        for differ in (lambda: check_same(model=index), lambda: check_shared(own, patience=0.1)):
            try:
                differ()
            except ValueError as error:
                print("RESULT", error, file=sys.stderr)
        run_on("rows", data=2, fsdp=2)
        run_on("inner", sequence=2, tensor=2)
        run_on("from_one", fsdp=4)
        from tests.test_processes import train_tiny
        trained = train_tiny(pathlib.Path(directory), "trained", MeshConfig(data=2, tensor=2))
        print("RESULT trained", sorted(trained), file=sys.stderr)
        run_on("dies", killed, data=2, fsdp=2)
except ConnectionError as error:
    print("RESULT", error, file=sys.stderr)
    leave(1)
"""


def run_together(directory, count):
    """(exit code, what it printed, its errors) of each process."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = str(server.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(directory), port, str(index), str(count)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        )
        for index in range(count)
    ]
    told = [process.communicate(timeout=600) for process in started]
    return [(process.returncode, *words) for process, words in zip(started, told)]


def run_here(directory, batches=None):
    """The run on one device; of a finished one, what was saved."""
    return run(directory, batches, evaluate=kernel_norm, eval_every=4)[0]


def train_tiny(directory, name, mesh):
    """All that a run does, of a tiny model in the directory; what its results.json holds."""
    changes = {"train.steps": 4, "train.eval_every": 0, "train.best_metric": None}
    config = sweeps.change(config_of(directory / "tiny"), changes | {"data.loader.buckets": [8]})
    return experiment.train(dataclasses.replace(config, mesh=mesh), directory / name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return directory, run_here(directory)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes did, one run after another, until the second of them died."""
    directory = tmp_path_factory.mktemp("two")
    run_here(directory / "from_one", ToyBatches(terminate(5)))
    (directory / "tiny").mkdir()
    config_of(tiny.write_folder(directory / "tiny"))  # which writes its data
    return directory, run_together(directory, 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """What four processes did until one of them was terminated."""
    directory = tmp_path_factory.mktemp("four")
    return directory, run_together(directory, 4)


def losses(directory):
    """Of each window of steps, by its last."""
    found = read_records(directory)
    return {record["step"]: record["loss"] for record in found if "loss" in record}


@pytest.mark.parametrize("name", ["rows", "inner", "from_one"])
def test_two_processes_end_where_one_does(two, whole, name):
    directory, told = two

    assert all(f"RESULT {name} finished 12 1" in errors for _, _, errors in told), told
    chex.assert_trees_all_close(losses(directory / name), losses(whole[0]), **NEAR)
    chex.assert_trees_all_close(run_here(directory / name).train, whole[1].train, **NEAR)


def test_two_processes_write_the_run_that_one_does(two):
    directory, told = two
    wanted = train_tiny(directory, "alone", MeshConfig())

    found = json.loads((directory / "trained" / "results.json").read_text())
    assert found["parameters"] == wanted["parameters"]
    for part, metrics in wanted["metrics"].items():
        assert found["metrics"][part] == pytest.approx(metrics, rel=1e-4)
    written = [
        {path.name for path in (directory / name).iterdir()} for name in ("trained", "alone")
    ]
    assert written[0] == written[1]
    assert f"RESULT trained {sorted(wanted)}" in told[0][2]
    assert "RESULT trained []" in told[1][2]


def test_a_signal_to_one_of_four_processes_saves_on_all_and_one_process_goes_on(four, whole):
    directory, told = four
    found = [re.search(r"RESULT four preempted (\d+) 1", errors) for _, _, errors in told]

    assert all(found), told
    (step,) = {int(match[1]) for match in found if match}
    assert (directory / "four" / "checkpoints" / str(step)).is_dir()
    wanted = {at: loss for at, loss in losses(whole[0]).items() if at < step}
    given = {at: loss for at, loss in losses(directory / "four").items() if at < step}
    chex.assert_trees_all_close(given, wanted, **NEAR)
    last = run_here(directory / "four")
    assert last.outcome == "finished"
    chex.assert_trees_all_close(last.train, whole[1].train, **NEAR)


def test_the_first_process_alone_speaks_and_all_end_well(four):
    _, told = four

    assert ["SPOKEN" in output for _, output, _ in told] == [True, False, False, False]
    assert [code for code, _, _ in told] == [0, 0, 0, 0]


def test_processes_that_were_given_other_things_are_told_which(two):
    for _, _, errors in two[1]:
        assert "must have the same model, and [1] differ from process 0" in errors
        assert "must have the same run directory, and [1] differ from process 0" in errors


def test_when_a_process_dies_the_others_say_so_and_the_checkpoint_is_whole(two, whole):
    directory, ((code, _, errors), (killed, _, _)) = two

    assert killed == -signal.SIGKILL
    assert code != 0
    assert re.search(r"another one is gone|lost the others", errors), errors
    assert "the same command, given to all processes, goes on" in errors
    assert "RESULT dies" not in errors
    assert list((directory / "dies" / "checkpoints").glob("[36]"))
    last = run_here(directory / "dies")
    chex.assert_trees_all_close(last.train, whole[1].train, **NEAR)


def test_an_unreachable_coordinator_is_named_with_the_seconds_that_were_waited():
    config = ProcessesConfig(coordinator="localhost:9", count=2, index=1, start_timeout=1)

    with (
        pytest.raises(ConnectionError, match=r"localhost:9, could not be reached for 1 s"),
        together(config),
    ):
        raise AssertionError("not reached")


@pytest.mark.parametrize("cluster", ["auto", "slurm", "ompi"])
def test_a_cluster_that_is_not_there_is_named(cluster, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_"))]:
        monkeypatch.delenv(name)

    with pytest.raises(ValueError, match=f"processes.cluster = '{cluster}'"):
        processes._find(ProcessesConfig(cluster=cluster))


def test_slurms_variables_say_where_the_coordinator_is(monkeypatch):
    given = {
        "SLURM_JOB_ID": "12",
        "SLURM_STEP_NODELIST": "node[003-004]",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)

    found = processes._find(ProcessesConfig(cluster="slurm"))
    assert found == ("node003:61452", 2, 1, [0])
    assert processes._find(ProcessesConfig(cluster="auto", index=0))[2] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "coordinator is missing"),
        ({"coordinator": "host:1", "count": 2}, "index is missing"),
        ({"coordinator": "host", "count": 2, "index": 0}, "expected host:port"),
        ({"coordinator": "host:1", "count": 2, "index": 2}, "less than count = 2"),
        ({"cluster": "auto", "lost_timeout": 0}, "lost_timeout must be at least 1, got 0"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        ProcessesConfig(**fields)


def test_rows_that_overlap_without_being_the_same_are_an_error():
    with pytest.raises(ValueError, match="these overlap"):
        find_share(np.array([[0, 0, 0, 1], [1, 1, 2, 2]]), 0)


def test_one_process_is_alone_and_needs_no_coordinator():
    with together(ProcessesConfig(coordinator="localhost:9", count=1, index=0)):
        assert not jax.distributed.is_initialized()
        processes.check_same(anything=object())


def test_a_sweep_is_not_of_several_processes(tmp_path):
    config = parse(CONFIG | {"processes": {"cluster": "auto"}}, ExperimentConfig)

    with pytest.raises(ValueError, match=r"config\.processes is for one run"):
        sweeps.train(config, sweeps.SweepConfig(runs=[{"seed": 1}]), tmp_path)


def test_mesh_and_processes_are_no_part_of_what_a_run_is(tmp_path):
    values = {
        "model": {"path": "m"},
        "data": {"source": {"train": "t.csv"}, "task": {}},
        "lora": {},
    }
    one = parse(values, ExperimentConfig)
    two = parse(values | {"mesh": {"data": -1}, "processes": {"cluster": "auto"}}, ExperimentConfig)

    start_run(tmp_path, one)
    check_run(tmp_path, two)

    assert identity(one) == identity(two)
    assert "mesh" not in json.loads(identity(one))
