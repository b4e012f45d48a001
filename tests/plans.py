"""Configs of a small LLaMA of which there is a config.json alone, for what plans are made of."""

import json
from typing import Any

from lorax_ft import planning
from lorax_ft.config import ExperimentConfig, parse
from lorax_ft.models import LlamaConfig

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "vocab_size": 512,
}
SIZES |= {"intermediate_size": 128, "max_position_embeddings": 256, "num_key_value_heads": 2}
CPU = planning.parse_target("cpu")


def write_model(folder):
    """Writes the config.json, and nothing else."""
    raw = LlamaConfig(**SIZES).to_hugging_face() | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def config_of(model, *, batch_size=8, length=32, compute=None, packed=None, **changes):
    half = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    values = {
        "model": {"path": str(model), "compute": {**half, **(compute or {})}},
        "data": {
            "source": {"train": "nowhere.txt"},
            "task": {"kind": "language_modelling", "length": length},
            "loader": {"batch_size": batch_size, "buckets": (length,)},
            "packed_length": packed,
        },
        "lora": {"rank": 4},
        "quantization": {"kind": "nf4"},
    }
    return parse(values | changes, ExperimentConfig)
