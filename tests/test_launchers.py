"""Workers of a sweep: each launcher ends in the table of this process, whatever dies on the way."""

import functools
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from lorax_ft import cli, sweeps
from lorax_ft.sweeps import launchers, worker
from lorax_ft.sweeps.launchers import End
from lorax_ft.sweeps.specification import SweepConfig
from lorax_ft.training import locks
from tests.test_sweep import config_of, folder  # noqa: F401

RUNS = [
    {"lora.targets": targets, "seed": seed}
    for targets in (["query"], ["query", "value"])
    for seed in (0, 1, 2)
]
SWEEP = SweepConfig(runs=RUNS, slots=2)
ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def workers_as_here(monkeypatch):
    """What workers need to find the library."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


@pytest.fixture(scope="module")
def config(folder):  # noqa: F811
    """Batches of one shape, for each worker traces its own program of each."""
    changes = {"train.steps": 24, "train.eval_every": 12, "train.checkpoint_every": 6}
    return sweeps.change(config_of(folder), changes | {"data.loader.buckets": [8]})


@pytest.fixture(scope="module")
def undisturbed(config, folder):  # noqa: F811
    return sweeps.train(config, SWEEP, folder / "here").rows


def table(rows):
    return {row.name: (row.results["outcome"], row.results["metrics"]) for row in rows}


def to_rounding(table):
    """The table that another process ends in: sums of float32 may differ there in the last bit."""
    near = functools.partial(pytest.approx, rel=1e-6, abs=0)
    return {
        name: (outcome, {part: near(found) for part, found in metrics.items()})
        for name, (outcome, metrics) in table.items()
    }


def test_a_process_killed_in_mid_group_ends_in_the_undisturbed_table(
    config, undisturbed, tmp_path, monkeypatch, capfd
):
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    def kill_when_saved():
        while not list(tmp_path.glob("groups/lora-1/checkpoints/[0-9]")):
            time.sleep(0.005)
        started[0].send_signal(signal.SIGKILL)

    monkeypatch.setattr(launchers.subprocess, "Popen", Recorded)
    threading.Thread(target=kill_when_saved, daemon=True).start()

    rows = sweeps.train(config, SWEEP, tmp_path, launcher="local:2").rows

    assert table(rows) == to_rounding(table(undisturbed))
    out = capfd.readouterr().out
    assert out.count("lora-1: its process died of SIGKILL; it is started again.") == 1
    assert re.search(r"lora-1 goes on from its checkpoint of tick \d", out)
    assert "lora-1: finished (2 of 2 groups have ended)" in out
    assert not list(tmp_path.glob("groups/*/checkpoints"))


def test_a_job_of_submitit_ends_in_the_same_table(config, undisturbed, tmp_path):
    pytest.importorskip("submitit")
    sweep = SweepConfig(runs=RUNS[:3], slots=2)

    rows = sweeps.train(
        config, sweep, tmp_path, launcher="slurm:local", resources={"mem_gb": 4}
    ).rows

    assert table(rows) == to_rounding(table(undisturbed[:3]))
    assert list((tmp_path / "slurm").glob("*_log.out"))


@pytest.mark.ray
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="pip install ray is missing")
@pytest.mark.filterwarnings("ignore")  # of Ray
def test_a_node_killed_in_mid_group_ends_in_the_undisturbed_table(
    config, undisturbed, tmp_path, monkeypatch, capfd
):
    """A head that trains nothing and two nodes, one of which dies with a group half done."""
    from ray.cluster_utils import Cluster

    def kill_when_saved():
        while not list(tmp_path.glob("groups/*/checkpoints/[0-9]")):
            time.sleep(0.005)
        saved = next(tmp_path.glob("groups/*/checkpoints/[0-9]")).parts[-3]
        holder = json.loads((tmp_path / "groups" / saved / "lock").read_text())["pid"]
        for node in list(cluster.worker_nodes):
            raylet = node.all_processes["raylet"][0].process.pid
            tasks = pathlib.Path(f"/proc/{raylet}/task").glob("*/children")
            if str(holder) in " ".join(path.read_text() for path in tasks).split():
                cluster.remove_node(node, allow_graceful=False)
                os.kill(holder, signal.SIGKILL)

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        threading.Thread(target=kill_when_saved, daemon=True).start()
        rows = sweeps.train(config, SWEEP, tmp_path, launcher="ray").rows
        assert len(cluster.worker_nodes) == 1
    finally:
        cluster.shutdown()

    assert table(rows) == to_rounding(table(undisturbed))
    assert "goes on from its checkpoint of tick" in capfd.readouterr().out


def test_what_dies_is_started_again_until_it_is_given_up(monkeypatch, capsys):
    monkeypatch.setattr(launchers, "POLL", 0.0)
    ends = {"dies": [End("it died", again=True)] * 9, "fails": [End("rank is 0")]}
    ends |= {"dies once": [End("it died", again=True), None, End()]}
    given = []

    def submit(name):
        given.append(name)
        return ends[name]

    found = dict(launchers._await(submit, lambda job: job.pop(0), list(ends), most=2))

    assert found == {"dies": "it died", "fails": "rank is 0", "dies once": None}
    assert given.count("dies") == 1 + launchers.RETRIES
    assert (given.count("fails"), given.count("dies once")) == (1, 2)
    assert capsys.readouterr().out.count("dies: it died; it is started again.") == launchers.RETRIES


BAD = [
    ("locl:2", {}, ValueError, "--launcher=locl:2: expected local:4, ray or slurm"),
    ("local", {}, ValueError, "local needs a number of processes, as local:4; got ''"),
    ("local:0", {}, ValueError, "a number of processes, as local:4; got '0'"),
    ("local:2", {"num_gpus": 1}, ValueError, "local takes no resources, got {'num_gpus': 1}"),
    (None, {"num_gpus": 1}, ValueError, "{'num_gpus': 1} need a launcher"),
    ("ray:somewhere:6379", {}, ValueError, "set RAY_ADDRESS=somewhere:6379"),
    ("ray", {}, ConnectionError, "RAY_ADDRESS=localhost:9 cannot be reached"),
    ("slurm", {}, ConnectionError, "there is no sbatch on this machine"),
    ("slurm:local", {"gpus": 1}, ValueError, "slurm: resources {'gpus': 1}: .*'gpus' need"),
]


@pytest.mark.parametrize(("launcher", "resources", "kind", "message"), BAD)
def test_a_launcher_that_cannot_be_is_named(
    config, tmp_path, monkeypatch, launcher, resources, kind, message
):
    monkeypatch.setenv("RAY_ADDRESS", "localhost:9")
    monkeypatch.setenv("PATH", str(tmp_path))  # which has no sbatch
    if package := {"ray": "ray", "slurm": "submitit"}.get((launcher or "").partition(":")[0]):
        pytest.importorskip(package)

    with pytest.raises(kind, match=message):
        sweeps.train(config, SWEEP, tmp_path / "sweep", launcher=launcher, resources=resources)
    assert not (tmp_path / "sweep" / "sweep.json").exists()


@pytest.mark.parametrize(("word", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_engine_is_named_with_its_extra(config, tmp_path, monkeypatch, word, package):
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'lorax_ft\[{word}\]'"):
        sweeps.train(config, SWEEP, tmp_path, launcher=word)


def test_data_are_checked_before_any_worker_starts(config, tmp_path):
    sweep = SweepConfig(runs=RUNS, metric="validation.acuracy")

    with pytest.raises(ValueError, match="metric: the evaluation has no 'acuracy'"):
        sweeps.train(config, sweep, tmp_path, launcher="local:1")
    assert not (tmp_path / "sweep.json").exists()


def test_a_worker_needs_the_directory_and_the_group_for_itself(config, tmp_path, monkeypatch):
    directory = tmp_path / "sweep"
    task = worker.Task(config=config, sweep=SWEEP, directory=directory, folder=ROOT)
    with pytest.raises(OSError, match=r"has no .*sweep\.json: workers need the sweep's directory"):
        task("lora-1")

    directory.mkdir()
    (directory / "sweep.json").touch()
    monkeypatch.setattr(worker, "PATIENCE", 0.1)
    with (
        locks.run_lock(directory / "groups" / "lora-1", patience=0.1),
        pytest.raises(RuntimeError, match="groups/lora-1 is in use by another run"),
    ):
        task("lora-1")


def test_the_driver_leaves_the_accelerator_to_its_workers(folder, tmp_path):  # noqa: F811
    code = f"""
import contextlib, pathlib
from jax._src import xla_bridge
from lorax_ft import sweeps
from lorax_ft.sweeps import launchers
from tests import test_launchers, test_sweep

@contextlib.contextmanager
def nowhere(argument, resources, directory):
    yield lambda task, names: [(name, None) for name in names]

launchers.LAUNCHERS["nowhere"] = nowhere
config = test_sweep.config_of(pathlib.Path({str(folder)!r}))
sweeps.train(config, test_launchers.SWEEP, {str(tmp_path)!r}, launcher="nowhere")
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_resources_of_the_command_line_are_numbers_where_they_can_be():
    given = ["num_gpus=0.5", "slurm_partition=long", 'resources={"TPU": 4}']

    assert cli.resources_of(given) == {
        "num_gpus": 0.5,
        "slurm_partition": "long",
        "resources": {"TPU": 4},
    }
    with pytest.raises(ValueError, match="--resource=gpu: expected NAME=VALUE"):
        cli.resources_of(["gpu"])
