"""A small LLaMA goes on with Shakespeare: causal language modelling over one text file.

    lorax-ft train --config=configs/shakespeare.py:lora \
        --config.model.path=stories260K/hf --config.data.source.train=input.txt
    lorax-ft generate --run_dir=runs/shakespeare-lora --do_sample --top_p=0.9 "ROMEO:"

The argument is the method: lora (all linear layers), qlora (the same on NF4), full, or one of the
others of `METHODS`. The last tenth of the text is held out.
"""

from ml_collections import ConfigDict

METHODS = {  # sections, learning rate
    "lora": ({"lora": {"rank": 8}}, 5e-3),
    "qlora": ({"lora": {"rank": 8}, "quantization": {"kind": "nf4"}}, 5e-3),
    "full": ({"full": {}}, 1e-3),
    "houlsby": ({"adapters": {"size": 16}}, 5e-3),
    "ia3": ({"ia3": {}}, 2e-2),
    "prefix": ({"prefix": {"length": 10}}, 2e-2),
    "prompt": ({"prompt": {"length": 10}}, 2e-2),
    "bitfit": ({"bitfit": {"add_missing": True}}, 1e-2),
    "norms": ({"norms": {}}, 2e-2),
    "vera": ({"vera": {}}, 2e-2),
    "adalora": ({"adalora": {}}, 1e-2),
}


def get_config(method: str = "lora") -> ConfigDict:
    if method not in METHODS:
        raise ValueError(f"shakespeare.py:{method} is not known, only {', '.join(METHODS)}")
    sections, learning_rate = METHODS[method]
    config = ConfigDict(sections)
    config.model = {"path": "models/stories260K/hf"}
    config.data = {
        "source": {"train": "data/shakespeare/input.txt"},
        "split": {"validation": 0.1},
        "task": {"kind": "language_modelling", "length": 128},
        "loader": {"batch_size": 32, "buckets": (128,)},
    }
    config.optimizer = {"learning_rate": learning_rate, "warmup_fraction": 0.03}
    config.train = {"epochs": 1.0}
    return config
