"""LLaMA by size and method, to plan without weights and to train with them.

    lorax-ft plan --config=configs/llama.py:65b-qlora64 --device=a6000
    lorax-ft train --config=configs/llama.py:3-8b-qlora16 \
        --config.model.path=meta-llama/Meta-Llama-3-8B --config.data.source.train=train.jsonl

The argument is SIZE-METHOD. Sizes: 7b, 13b, 33b, 65b, 3-8b, 3-70b, 3.2-1b, whose config.json are
in configs/models/. Methods: qlora16 and qlora64 (NF4 with double quantisation, that rank on all
linear layers), lora (rank 16 on bfloat16), full. QLoRA's recipe: alpha 16, dropout .1, constant
rate 2e-4, clipped at .3, and 16 rows a step, one at a time: here one row, or with
--config.data.loader.batch_size=16 --config.train.accumulation=16 as many.

`train.jsonl` has a prompt and a completion in each line. What plans said:
experiments/plan/README.md.
"""

import pathlib

from ml_collections import ConfigDict

SIZES = ("7b", "13b", "33b", "65b", "3-8b", "3-70b", "3.2-1b")
NF4 = {"kind": "nf4"}
METHODS = {
    "qlora16": {"lora": {"rank": 16, "dropout": 0.1}, "quantization": NF4},
    "qlora64": {"lora": {"rank": 64, "dropout": 0.1}, "quantization": NF4},
    "lora": {"lora": {"rank": 16}},
    "full": {"full": {}},
}
LENGTH = 512


def get_config(argument: str = "7b-qlora64") -> ConfigDict:
    size, _, method = argument.rpartition("-")
    if size not in SIZES or method not in METHODS:
        raise ValueError(
            f"llama.py:{argument} is not known, only SIZE-METHOD with a size of "
            f"{', '.join(SIZES)} and a method of {', '.join(METHODS)}"
        )
    config = ConfigDict(METHODS[method])
    models = pathlib.Path(__file__).resolve().parent / "models"
    config.model = {
        "path": str(models / f"llama-{size}"),
        "compute": {"dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full"},
    }
    config.data = {
        "source": {"train": "train.jsonl"},
        "task": {"kind": "prompt_completion", "max_length": LENGTH},
        "loader": {"batch_size": 1, "buckets": (LENGTH,)},
    }
    config.optimizer = {"learning_rate": 2e-4, "schedule": "constant", "clip_norm": 0.3}
    return config
