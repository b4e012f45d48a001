"""Parameter-efficient fine-tuning in JAX: adapters and quantisation for any pure function."""

from lorax_ft.inspection import Use, inspect
from lorax_ft.leaves import Leaf, dense, is_leaf, leaf, static_field
from lorax_ft.lift import lift
from lorax_ft.methods import (
    METHODS,
    BitFitConfig,
    FullConfig,
    HeadConfig,
    LoraConfig,
    add_lora,
    add_methods,
    drift,
    merge,
    set_dropout_key,
    unmerge,
)
from lorax_ft.quantization import QuantizationConfig, bits_per_parameter, quantize, quantize_array
from lorax_ft.trees import combine, count, flatten, partition, summary

__all__ = [
    "METHODS",
    "BitFitConfig",
    "FullConfig",
    "HeadConfig",
    "Leaf",
    "LoraConfig",
    "QuantizationConfig",
    "Use",
    "add_lora",
    "add_methods",
    "bits_per_parameter",
    "combine",
    "count",
    "dense",
    "drift",
    "flatten",
    "inspect",
    "is_leaf",
    "leaf",
    "lift",
    "merge",
    "partition",
    "quantize",
    "quantize_array",
    "set_dropout_key",
    "static_field",
    "summary",
    "unmerge",
]
