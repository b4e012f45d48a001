"""Rotary order: adapters made on weights as Meta's LLaMA files have them, in Hugging Face's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lorax_ft.interop.prompts import TENSOR
from lorax_ft.models import LlamaConfig, Model
from lorax_ft.models.attention import halved_rows
from lorax_ft.models.decoders import ROTATED
from lorax_ft.models.hugging_face import match_name

# What of a module runs along its outputs, by the ends of PEFT's names.
_ALONG_OUTPUTS = (
    *("lora_B.weight", "lora_B", "lora_magnitude_vector", "lora_magnitude_vector.weight"),
    *("ia3_l", "weight", "bias"),
)


def halved(tensors: Mapping[str, np.ndarray], kind: str, model: Any) -> dict[str, np.ndarray]:
    """The tensors of a PEFT file with what they have of queries and keys in Hugging Face's order.

    Meta's files have the two numbers that rotate together side by side, Hugging Face's half a head
    apart. `kind` is the file's peft_type. Raises ValueError where the model has no rotary
    positions.
    """
    if not isinstance(model, Model) or not isinstance(model.config, LlamaConfig):
        raise ValueError(
            "load_peft: interleaved_rotary is for models with rotary positions, such as LLaMA; "
            "leave it out."
        )
    return {name: _halved(name, tensor, kind, model) for name, tensor in tensors.items()}


def _halved(name: str, tensor: np.ndarray, kind: str, model: Model) -> np.ndarray:
    size = model.config.size_of_head
    if name == TENSOR and kind == "PREFIX_TUNING":  # [n, layers, keys and values, kv_heads * size]
        layers = model.config.num_hidden_layers
        pieces = tensor.reshape(tensor.shape[0], layers, 2, -1).copy()
        pieces[:, :, 0] = np.moveaxis(halved_rows(np.moveaxis(pieces[:, :, 0], -1, 0), size), 0, -1)
        return pieces.reshape(tensor.shape)
    module = name.removeprefix("base_model.model.")
    templates = [model.family.tables.names[path.rstrip("/")] for path in ROTATED]
    for end in _ALONG_OUTPUTS:
        if not module.endswith("." + end):
            continue
        owner = module.removesuffix("." + end).removesuffix(".base_layer")
        along_inputs = end == "ia3_l" and tensor.shape[0] == 1
        if any(match_name(template, owner) for template in templates) and not along_inputs:
            return halved_rows(tensor, size)
    return tensor
