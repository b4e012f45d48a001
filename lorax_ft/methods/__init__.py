"""Fine-tuning methods: pure rewrites of a parameter tree. A new one is a file and a row in
`METHODS`."""

from lorax_ft.methods.dora import DoRA
from lorax_ft.methods.lora import LoraConfig, add_lora, set_dropout_key
from lorax_ft.methods.lora_leaf import LoRA
from lorax_ft.methods.merging import Drift, drift, merge, unmerge
from lorax_ft.methods.selection import BitFitConfig, FullConfig, HeadConfig
from lorax_ft.methods.table import METHODS, Method, add_methods

__all__ = [
    "METHODS",
    "BitFitConfig",
    "DoRA",
    "Drift",
    "FullConfig",
    "HeadConfig",
    "LoRA",
    "LoraConfig",
    "Method",
    "add_lora",
    "add_methods",
    "drift",
    "merge",
    "set_dropout_key",
    "unmerge",
]
