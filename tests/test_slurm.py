"""A sweep by the jobs of a real Slurm: one of this machine alone, started here and thrown away."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import threading
import time

import pytest

from lorax_ft import sweeps
from lorax_ft.sweeps import launchers
from tests.test_launchers import (  # noqa: F401
    SWEEP,
    config,
    table,
    to_rounding,
    undisturbed,
    workers_as_here,
)
from tests.test_sweep import folder  # noqa: F401

MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
CONFIG = """
ClusterName=thrown_away
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
NodeName=only NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
PartitionName=main Nodes=ALL Default=YES
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A Slurm without accounting, whose only node is this machine with four CPUs."""
    # Its import ends all handlers of logging, and absl's would end what capfd has put aside.
    pytest.importorskip("submitit")
    directory = tmp_path / "slurm"
    for name in ("state", "spool"):
        (directory / name).mkdir(parents=True)
    written, key = directory / "slurm.conf", directory / "munge.key"
    host = socket.gethostname().partition(".")[0]
    written.write_text(CONFIG.format(host=host, ports=free_ports(2), folder=directory))
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    monkeypatch.setenv("SLURM_CONF", str(written))
    files = {"key-file": key, "socket": "munge.socket", "pid-file": "munge.pid"}
    files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
    munge = [f"--{option}={directory / name}" for option, name in files.items()]
    with (
        running(directory, "munged", "--foreground", "--force", *munge),
        running(directory, "slurmctld", "-D", "-c", "-f", str(written)),
        running(directory, "slurmd", "-D", "-N", "only", "-f", str(written)),
    ):
        await_words(directory, "idle", "sinfo", "--noheader", "--format=%T")
        try:
            yield
        finally:
            subprocess.run(["scancel", "--user=root"], check=True)
            await_words(directory, "", "squeue", "--noheader")


def free_ports(count):
    with contextlib.ExitStack() as held:
        servers = [held.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


@contextlib.contextmanager
def running(directory, name, *options):
    with (directory / f"{name}.out").open("w") as out:
        process = subprocess.Popen([name, *options], stdout=out, stderr=out)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def await_words(directory, words, *command):
    """Returns when the command says just these; fails with the daemons' logs when it does not."""
    deadline = time.monotonic() + 40
    while subprocess.run(command, capture_output=True, text=True).stdout.strip() != words:
        if time.monotonic() > deadline:
            logs = [*directory.glob("*.out"), *directory.glob("*.log")]
            pytest.fail("\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in logs))
        time.sleep(0.1)


def test_while_slurm_does_not_answer_its_jobs_count_as_running(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(launchers, "QUEUE_POLL", 0.0)
    squeue, queue = tmp_path / "squeue", launchers.SlurmQueue(ids={"7"})
    squeue.touch(mode=0o755)

    squeue.write_text("#!/bin/sh\nexit 1\n")
    assert queue.has("7")
    squeue.write_text("#!/bin/sh\necho 8\n")
    assert not queue.has("7")
    assert queue.has("8")


@pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)}: install slurm-wlm and munge")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a Slurm")
def test_jobs_killed_and_requeued_end_in_the_undisturbed_table(
    slurm,
    config,  # noqa: F811
    undisturbed,  # noqa: F811
    tmp_path,
    monkeypatch,
    capfd,
):
    monkeypatch.setattr(launchers, "QUEUE_POLL", 0.5)
    directory = tmp_path / "sweep"

    def holder_when_saved(group):
        while not list(directory.glob(f"groups/{group}/checkpoints/[0-9]")):
            time.sleep(0.005)
        return json.loads((directory / "groups" / group / "lock").read_text())["pid"]

    def kill():
        os.kill(holder_when_saved("lora-1"), signal.SIGKILL)

    def requeue():
        holder = holder_when_saved("lora-2")
        os.kill(holder, signal.SIGSTOP)  # until Slurm has it stop and save
        variables = pathlib.Path(f"/proc/{holder}/environ").read_text().split("\0")
        job = next(v for v in variables if v.startswith("SLURM_JOB_ID=")).partition("=")[2]
        subprocess.run(["scontrol", "requeue", job], check=True)

    for disturb in (kill, requeue):
        threading.Thread(target=disturb, daemon=True).start()
    rows = sweeps.train(
        config, SWEEP, directory, launcher="slurm", resources={"cpus_per_task": 1}
    ).rows

    assert table(rows) == to_rounding(table(undisturbed))
    told, logs = capfd.readouterr().out, directory / "slurm"
    assert told.count("it is started again") == 1  # Slurm itself starts the other one again
    assert "lora-1: its job" in told
    assert len(list(logs.glob("*_submission.sh"))) == 3
    words = "".join(log.read_text() for log in logs.glob("*_log.out"))
    assert "lora-1 goes on from its checkpoint of tick" in words
    assert "lora-2 goes on from its checkpoint of tick" in words
    assert not list(directory.glob("groups/*/checkpoints"))
