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
    repeat_index,
    select,
    set_index,
    stack_adapters,
)
from lorax_ft.methods.adapters import (
    Adapter,
    AdapterConfig,
    ParallelAdapter,
    add_adapters,
)
from lorax_ft.methods.added_bias import (
    AddedBias,
    add_biases,
)
from lorax_ft.methods.combining import (
    COMBINATIONS,
    CombinationConfig,
    combine_adapters,
)
from lorax_ft.methods.dora import (
    DoRA,
)
from lorax_ft.methods.dropping import (
    set_dropout_key,
)
from lorax_ft.methods.ia3 import (
    IA3,
    IA3Bias,
    IA3Config,
    add_ia3,
)
from lorax_ft.methods.lora import (
    LoraConfig,
    add_lora,
)
from lorax_ft.methods.lora_leaf import (
    LoRA,
)
from lorax_ft.methods.merging import (
    Drift,
    drift,
    merge,
    unmerge,
)
from lorax_ft.methods.mixed_lora import (
    MixedLoRA,
)
from lorax_ft.methods.prompts import (
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
)
from lorax_ft.methods.selection import (
    BitFitConfig,
    FullConfig,
    HeadConfig,
    NormConfig,
    TopLayersConfig,
)
from lorax_ft.methods.table import (
    METHODS,
    Method,
    add_methods,
)
from lorax_ft.methods.vera import (
    VeRA,
    VeraConfig,
    add_vera,
)

__all__ = [
    "COMBINATIONS",
    "IA3",
    "METHODS",
    "AdaLoRA",
    "AdaLoraConfig",
    "Adapter",
    "AdapterConfig",
    "AdapterSet",
    "AddedBias",
    "Allocation",
    "BitFitConfig",
    "CombinationConfig",
    "DoRA",
    "Drift",
    "FullConfig",
    "HeadConfig",
    "IA3Bias",
    "IA3Config",
    "LoRA",
    "LoraConfig",
    "Method",
    "MixedLoRA",
    "NormConfig",
    "PTuningConfig",
    "ParallelAdapter",
    "PrefixConfig",
    "PromptConfig",
    "TopLayersConfig",
    "VeRA",
    "VeraConfig",
    "adapter_index",
    "add_adalora",
    "add_adapters",
    "add_biases",
    "add_ia3",
    "add_lora",
    "add_methods",
    "add_vera",
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
    "repeat_index",
    "select",
    "set_dropout_key",
    "set_index",
    "stack_adapters",
    "start_allocation",
    "unmerge",
]
