"""Processes of `lorax-ft` that train MiniLM with LoRA on TREC, timed from beginning to end."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time
from typing import Any

PROGRAM = "import sys; from lorax_ft.cli import main; sys.exit(main())"


def trec_flags(data: str, **train: Any) -> list[str]:
    """The config of a run, with keys of its `train` section; a tenth of the questions validates."""
    folder = pathlib.Path(data) / "trec"
    values = {
        "data.source.train": folder / "train_5500.label",
        "data.source.test": folder / "TREC_10.label",
        "data.split.validation": 0.1,
        "train.tensorboard": "false",
        "train.progress_bar": "false",
        "baseline": "false",
        **{f"train.{name}": value for name, value in train.items()},
    }
    return ["--config=configs/trec.py:lora", *(f"--config.{k}={v}" for k, v in values.items())]


def seconds_of(arguments: list[str], cache: pathlib.Path) -> float:
    """What the program takes with these arguments, compiled programs being kept in `cache`."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", PROGRAM, *arguments], check=True, env=environment)
    return time.perf_counter() - start
