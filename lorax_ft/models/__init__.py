"""Models in plain Linen, and their weights from and to Hugging Face directories."""

from lorax_ft.models.attention import RotaryConfig
from lorax_ft.models.bert import Bert, BertConfig, Encoded
from lorax_ft.models.gpt2 import Gpt2, Gpt2Config
from lorax_ft.models.hub import fingerprint, load, save
from lorax_ft.models.layers import ComputeConfig, stack_layers, unstack_layers
from lorax_ft.models.llama import Llama, LlamaConfig
from lorax_ft.models.model import (
    Cache,
    Model,
    build,
    check_inputs,
    hugging_face_name,
    module_path,
)
from lorax_ft.models.t5 import T5, shift_right
from lorax_ft.models.t5_config import T5Config

__all__ = [
    "T5",
    "Bert",
    "BertConfig",
    "Cache",
    "ComputeConfig",
    "Encoded",
    "Gpt2",
    "Gpt2Config",
    "Llama",
    "LlamaConfig",
    "Model",
    "RotaryConfig",
    "T5Config",
    "build",
    "check_inputs",
    "fingerprint",
    "hugging_face_name",
    "load",
    "module_path",
    "save",
    "shift_right",
    "stack_layers",
    "unstack_layers",
]
