"""Fine-tuning methods: pure rewrites of a parameter tree. A new one is a file and a row in
`METHODS`."""

from lorax_ft.methods.adalora import (
    AdaLoRA,
    AdaLoraConfig,
    Allocation,
    add_adalora,
    allocate,
    as_lora,
    budget_schedule,
    orthogonality,
    start_allocation,
)
from lorax_ft.methods.adapter_sets import (
    AdapterSet,
    adapter_index,
    check_index,
    index_from_inputs,
    mix,
    select,
    set_index,
    stack_adapters,
)
from lorax_ft.methods.combining import COMBINATIONS, CombinationConfig, combine_adapters
from lorax_ft.methods.dora import DoRA
from lorax_ft.methods.lora import LoraConfig, add_lora, set_dropout_key
from lorax_ft.methods.lora_leaf import LoRA
from lorax_ft.methods.merging import Drift, drift, merge, unmerge
from lorax_ft.methods.mixed_lora import MixedLoRA
from lorax_ft.methods.selection import BitFitConfig, FullConfig, HeadConfig
from lorax_ft.methods.table import METHODS, Method, add_methods

__all__ = [
    "COMBINATIONS",
    "METHODS",
    "AdaLoRA",
    "AdaLoraConfig",
    "AdapterSet",
    "Allocation",
    "BitFitConfig",
    "CombinationConfig",
    "DoRA",
    "Drift",
    "FullConfig",
    "HeadConfig",
    "LoRA",
    "LoraConfig",
    "Method",
    "MixedLoRA",
    "adapter_index",
    "add_adalora",
    "add_lora",
    "add_methods",
    "allocate",
    "as_lora",
    "budget_schedule",
    "check_index",
    "combine_adapters",
    "drift",
    "index_from_inputs",
    "merge",
    "mix",
    "orthogonality",
    "select",
    "set_dropout_key",
    "set_index",
    "stack_adapters",
    "start_allocation",
    "unmerge",
]
