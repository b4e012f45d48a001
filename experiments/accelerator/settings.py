"""The config of a run of the benchmark's shapes, as `lorax-ft train` would read it."""

from __future__ import annotations

from typing import Any

from common import LEARNING_RATE, MODELS, RANK

from lorax_ft.config import ExperimentConfig, parse


def experiment(
    method: str, model: str, remat: str, rows: int, length: int, **compute: Any
) -> ExperimentConfig:
    """The config of a run of these shapes, with further fields of `model.compute`."""
    half = {"dtype": "bfloat16", "param_dtype": "bfloat16", "remat": remat, **compute}
    sections: dict[str, Any] = {"lora": {"rank": RANK, "targets": "all-linear"}}
    if method == "qlora":
        sections["quantization"] = {"kind": "nf4"}
    data = {
        "source": {"train": "none"},
        "task": {"kind": "prompt_completion", "max_length": length},
        "loader": {"batch_size": rows, "buckets": (length,)},
    }
    optimizer = {"learning_rate": LEARNING_RATE, "schedule": "constant"}
    path = {"path": str(MODELS[model]), "compute": half}
    values = {"model": path, "data": data, "optimizer": optimizer, **sections}
    return parse(values, ExperimentConfig)
