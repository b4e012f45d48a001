"""The lock on a directory: who is kept out, who is waited for, and whose lock counts as dead."""

import json
import socket
import subprocess
import sys
import threading

import pytest

from lorax_ft.training import locks
from lorax_ft.training.locks import run_lock


def test_the_lock_of_a_process_that_died_keeps_no_one_out(tmp_path):
    code = (
        "import os, sys; from lorax_ft.training.locks import run_lock\n"
        "with run_lock(sys.argv[1]): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert json.loads((tmp_path / "lock").read_text())["host"] == socket.gethostname()

    with run_lock(tmp_path):
        pass


def test_the_lock_of_another_host_is_respected_until_it_is_deleted(tmp_path):
    (tmp_path / "lock").write_text('{"pid": 1, "host": "elsewhere"}')

    with pytest.raises(RuntimeError, match=r"elsewhere.*delete"), run_lock(tmp_path):
        pass


def test_the_lock_of_another_host_is_taken_over_when_it_has_gone_quiet(tmp_path):
    (tmp_path / "lock").write_text('{"pid": 1, "host": "elsewhere"}')

    with run_lock(tmp_path, patience=0.3):
        assert json.loads((tmp_path / "lock").read_text())["host"] == socket.gethostname()


def test_a_holder_on_another_host_is_heard(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    with run_lock(tmp_path, patience=0.3):
        monkeypatch.setattr(locks, "_is_locked", lambda file: True)  # each host locks for itself
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")

        with pytest.raises(RuntimeError, match="still going"), run_lock(tmp_path, patience=0.3):
            pass


def test_a_holder_is_waited_for_with_patience(tmp_path):
    left, entered = threading.Event(), threading.Event()

    def hold():
        with run_lock(tmp_path):
            entered.set()
            left.wait(5)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(5)
    threading.Timer(0.3, left.set).start()

    with run_lock(tmp_path, patience=5):
        assert left.is_set()
    holder.join()
