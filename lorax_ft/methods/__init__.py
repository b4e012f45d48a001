"""Fine-tuning methods: pure rewrites of a parameter tree. A new one is a file and a row in
`METHODS`."""

from lorax_ft.methods.adapters import Adapter, AdapterConfig, ParallelAdapter, add_adapters
from lorax_ft.methods.added_bias import AddedBias, add_biases
from lorax_ft.methods.dora import DoRA
from lorax_ft.methods.dropping import set_dropout_key
from lorax_ft.methods.ia3 import IA3, IA3Bias, IA3Config, add_ia3
from lorax_ft.methods.lora import LoraConfig, add_lora
from lorax_ft.methods.lora_leaf import LoRA
from lorax_ft.methods.merging import Drift, drift, merge, unmerge
from lorax_ft.methods.prompts import (
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    Virtual,
    split_virtual,
)
from lorax_ft.methods.selection import (
    BitFitConfig,
    FullConfig,
    HeadConfig,
    NormConfig,
    TopLayersConfig,
)
from lorax_ft.methods.table import METHODS, Method, add_methods
from lorax_ft.methods.vera import VeRA, VeraConfig, add_vera

__all__ = [
    "IA3",
    "METHODS",
    "Adapter",
    "AdapterConfig",
    "AddedBias",
    "BitFitConfig",
    "DoRA",
    "Drift",
    "FullConfig",
    "HeadConfig",
    "IA3Bias",
    "IA3Config",
    "LoRA",
    "LoraConfig",
    "Method",
    "NormConfig",
    "PTuningConfig",
    "ParallelAdapter",
    "PrefixConfig",
    "PromptConfig",
    "TopLayersConfig",
    "VeRA",
    "VeraConfig",
    "Virtual",
    "add_adapters",
    "add_biases",
    "add_ia3",
    "add_lora",
    "add_methods",
    "add_vera",
    "drift",
    "merge",
    "set_dropout_key",
    "split_virtual",
    "unmerge",
]
