"""AdaLoRA as PEFT keeps it: singular values in `lora_E`, each module with its own rank."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_ft import trees
from lorax_ft.interop import files
from lorax_ft.methods import AdaLoRA
from lorax_ft.models.hugging_face import Tables, module_name

PREFIX = "base_model.model."

# Fields that are read, or that say how ranks were allotted while it was trained.
READ = frozenset(
    """
    init_r lora_alpha lora_dropout rank_pattern bias modules_to_save target_modules exclude_modules
    r target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step init_lora_weights
    layers_to_transform layers_pattern fan_in_fan_out megatron_core loftq_config qalora_group_size
    runtime_config alpha_pattern
    """.split()
)
_ZERO = 1e-5  # PEFT divides the scale by the rank and this
_TENSOR = re.compile(r"(?P<module>.+?)\.(?:lora_(?P<part>[ABE])|base_layer\.(?P<bias>bias))")
_NEEDED = {"A", "B", "E"}

Layers = dict[int | None, dict[str, np.ndarray]]


def from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], tables: Tables, params: Any
) -> tuple[Any, tuple[str, ...]]:
    """Params with AdaLoRA leaves, and the patterns of the arrays that were saved whole.

    A layer whose rank was cut lower than others' of its stack has zeros for singular values.
    Raises ValueError where `files` does, and for tensors that do not fit one another, the base or
    `rank_pattern`.
    """
    files.check_fields(config, READ, required=("init_r", "lora_alpha"))
    if config.get("alpha_pattern"):  # of LoRA's config, and left unread by PEFT's AdaLoRA
        raise ValueError(f"{files.CONFIG}: AdaLoRA has no alpha_pattern.")
    paths = trees.flatten(params)
    plain: files.Pieces = {}
    adapters: dict[str, Layers] = collections.defaultdict(lambda: collections.defaultdict(dict))
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = _TENSOR.fullmatch(name)
        if match and match["part"]:
            path, layer = files.our_path(key, match["module"], ("kernel",), tables, paths)
            adapters[path][layer][match["part"]] = tensor
        else:
            name = f"{match['module']}.bias" if match else name
            files.add_plain(plain, key, name, tensor, tables, paths)
    files.warn_of_orientation(config, adapters, tables)
    ranks = _ranks(config)
    params, trained = files.fill(params, plain)
    leaves = {
        path: _leaf(path, paths[path], layers, tables, config, ranks)
        for path, layers in adapters.items()
    }
    return trees.with_fields(params, leaves), trained


def _ranks(config: Mapping[str, Any]) -> dict[str, int]:
    """The rank that each module was left, where it was cut, by the module's name."""
    pattern = config.get("rank_pattern") or {}
    return {
        re.sub(r"\.lora_E(\.\w+)?$", "", name.removeprefix(PREFIX)): sum(kept)
        for name, kept in pattern.items()
    }


def _leaf(
    path: str,
    base: Any,
    layers: Layers,
    tables: Tables,
    config: Mapping[str, Any],
    ranks: Mapping[str, int],
) -> AdaLoRA:
    """One parameter's leaf from the tensors of its layers; one without an adapter gets zeros."""
    stacked = None not in layers
    count = base.shape[0] if stacked else 1
    in_size, out_size = base.shape[-2:]
    rows = max(1, *(parts["E"].shape[0] for parts in layers.values() if "E" in parts))
    a = np.zeros((count, rows, in_size), np.float32)
    values = np.zeros((count, rows), np.float32)
    b = np.zeros((count, rows, out_size), np.float32)
    for layer, parts in layers.items():
        module = module_name(tables.names, path, layer)
        if set(parts) != _NEEDED:
            raise ValueError(f"load_peft: {module}: found {sorted(parts)}, not {sorted(_NEEDED)}.")
        rank = ranks.get(module, config["init_r"])
        shapes = {part: list(tensor.shape) for part, tensor in sorted(parts.items())}
        expected = {"A": [rank, in_size], "B": [out_size, rank], "E": [rank, 1]}
        if shapes != expected:
            raise ValueError(
                f"load_peft: {module}: lora_A, B and E are {shapes}, but a rank of {rank} and the "
                f"base make them {expected}. Is this the adapter's base model?"
            )
        index = layer or 0
        a[index, :rank], b[index, :rank] = parts["A"], parts["B"].T
        values[index, :rank] = parts["E"][:, 0]
    a, values, b = (jnp.asarray(f if stacked else f[0]) for f in (a, values, b))
    stack, dropout = values.shape[:-1], config.get("lora_dropout")
    return AdaLoRA(
        base=base,
        a=a,
        values=values,
        b=b,
        scale=jnp.full(stack, _scale(config), jnp.float32),
        dropout=jnp.full(stack, dropout) if dropout else None,
    )


def _scale(config: Mapping[str, Any]) -> float:
    """PEFT's scale, which goes by the first rank also where it was cut."""
    alpha, rank = config["lora_alpha"], config["init_r"]
    return (alpha if alpha > 0 else float(rank)) / (rank + _ZERO)
