"""A run on a cluster: its workers end where one process does, also when one of them dies."""

import functools
import importlib.util
import json
import os
import pathlib
import signal
import sys
import threading
import time

import pytest

from lorax_ft import cli, cluster, experiment, sweeps
from lorax_ft.config import ExperimentConfig, parse, to_dict
from tests.test_sweep import config_of, folder  # noqa: F401

ROOT = pathlib.Path(__file__).resolve().parent.parent
HAS_RAY = importlib.util.find_spec("ray") is not None


@pytest.fixture(scope="module")
def config(folder):  # noqa: F811
    return sweeps.change(config_of(folder), {"train.steps": 24, "train.eval_every": 12})


def on_a_mesh(config, **axes):
    return parse(to_dict(config) | {"mesh": axes}, ExperimentConfig)


@pytest.mark.ray
@pytest.mark.skipif(not HAS_RAY, reason="pip install 'ray[train]' is missing")
@pytest.mark.filterwarnings("ignore")  # of Ray
def test_a_run_whose_first_worker_is_killed_ends_where_one_process_does(
    config, tmp_path, monkeypatch, capfd
):
    for name in ("RAY_ADDRESS", "XLA_FLAGS"):  # workers have a device each
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    directory = tmp_path / "cluster"

    def kill_when_saved():
        while not list(directory.glob("checkpoints/[0-9]")):
            time.sleep(0.005)
        os.kill(json.loads((directory / "lock").read_text())["pid"], signal.SIGKILL)

    threading.Thread(target=kill_when_saved, daemon=True).start()
    found = cluster.train(on_a_mesh(config, data=2), directory, {"num_workers": 2})
    out = capfd.readouterr().out
    wanted = experiment.train(config, tmp_path / "here")

    near = functools.partial(pytest.approx, rel=1e-4)
    assert found["outcome"] == "finished"
    assert found["metrics"] == {part: near(of) for part, of in wanted["metrics"].items()}
    assert out.count("Workers are started again, since one was lost") == 1
    assert not (directory / "ray").exists()


BAD = [
    ({"gpus": 1}, ValueError, "resources {'gpus': 1}: .*unexpected keyword argument 'gpus'"),
    ({"num_workers": 0}, ValueError, "num_workers must be at least 1, got 0"),
    ({"num_workers": 2}, ConnectionError, "RAY_ADDRESS=localhost:9 cannot be reached"),
]


@pytest.mark.skipif(not HAS_RAY, reason="pip install 'ray[train]' is missing")
@pytest.mark.filterwarnings("ignore")  # of Ray
@pytest.mark.parametrize(("resources", "kind", "message"), BAD)
def test_what_cannot_be_is_named_and_leaves_nothing(
    config, tmp_path, monkeypatch, resources, kind, message
):
    monkeypatch.setenv("RAY_ADDRESS", "localhost:9")

    with pytest.raises(kind, match=message):
        cluster.train(config, tmp_path / "run", resources)
    assert not (tmp_path / "run").exists()


def test_a_missing_engine_is_named_with_its_extra(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(ImportError, match=r"needs ray(\.train)?: pip install 'lorax_ft\[ray\]'"):
        cluster.train(config, tmp_path, {"num_workers": 2})


def test_the_workers_are_the_processes(config, tmp_path):
    given = parse(to_dict(config) | {"processes": {"cluster": "auto"}}, ExperimentConfig)

    with pytest.raises(ValueError, match=r"config\.processes: with --launcher=ray"):
        cluster.train(given, tmp_path, {"num_workers": 2})


def test_the_command_gives_workers_their_resources(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(cluster, "train", lambda *given, command: seen.append((*given, command)))
    command = ["lorax-ft", "train", "--config=configs/quickstart.py", "--run_dir=somewhere"]
    monkeypatch.chdir(ROOT)

    given = ["--launcher=ray", "--resource=num_workers=2", "--resource=use_gpu=true"]
    assert cli.main([*command, *given]) == 0
    assert cli.main([*command, "--resource=num_workers=2"]) == 2

    ((_, directory, resources, line),) = seen
    assert (directory, resources) == ("somewhere", {"num_workers": 2, "use_gpu": True})
    assert line == "lorax-ft train --config=configs/quickstart.py --run_dir=somewhere"
    assert "need a launcher: give --launcher=ray too" in capsys.readouterr().err
