"""IA3 as PEFT keeps it: one `ia3_l` for each module, along its outputs or, of a feed-forward
module, its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_ft import trees
from lorax_ft.interop import files
from lorax_ft.methods import IA3, IA3Bias
from lorax_ft.methods.targets import bias_of
from lorax_ft.models.hugging_face import Tables, module_name

PREFIX = "base_model.model."
READ = frozenset(
    """
    target_modules exclude_modules feedforward_modules modules_to_save init_ia3_weights
    fan_in_fan_out
    """.split()
)


def to_peft(
    tables: Tables, params: Any, trainable: trees.Patterns
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields of the config, tensors) of the IA3 leaves and of the arrays that are saved whole."""
    tensors: dict[str, Any] = {}
    feedforward, targets = set(), set()
    for path, value in trees.flatten(params).items():
        if not isinstance(value, (IA3, IA3Bias)):
            continue
        on_inputs = isinstance(value, IA3) and value.on_inputs
        for index in np.ndindex(value.stack_shape):
            name = module_name(tables.names, path, *index)
            gain = np.asarray(value.gain[index])
            tensors[f"{name}.ia3_l"] = gain[None] if on_inputs else gain[:, None]
            targets.add(name)
            feedforward |= {name} if on_inputs else set()
    saved, biases = files.plain_tensors(tables, params, trainable)
    config = {
        "fan_in_fan_out": False,
        "feedforward_modules": sorted(feedforward),
        "init_ia3_weights": True,
        "modules_to_save": files.modules_of(saved, biases, tables),
        "target_modules": sorted(targets),
    }
    return config, {PREFIX + name: tensor for name, tensor in {**tensors, **saved}.items()}


def from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], tables: Tables, params: Any
) -> tuple[Any, tuple[str, ...]]:
    """Params with IA3 leaves, and the patterns of the arrays that were saved whole."""
    files.check_fields(config, READ)
    paths = trees.flatten(params)
    gains: files.Pieces = {}
    plain: files.Pieces = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if name.endswith(".ia3_l"):
            path, layer = files.our_path(
                key, name.removesuffix(".ia3_l"), ("kernel",), tables, paths
            )
            gains.setdefault(path, {})[layer] = tensor
        else:
            files.add_plain(plain, key, name, tensor, tables, paths)
    params, trained = files.fill(params, plain)
    leaves = dict(_leaf(path, layers, params) for path, layers in gains.items())
    return trees.with_fields(params, leaves), trained


def _leaf(path: str, layers: Mapping[int | None, np.ndarray], params: Any) -> tuple[str, Any]:
    """The path and the leaf of one kernel's gains; a layer that has none keeps a gain of one."""
    parameters = trees.flatten(params)
    kernel = parameters[path]
    first = next(iter(layers.values()))
    on_inputs = first.shape[0] == 1
    size = kernel.shape[-2] if on_inputs else kernel.shape[-1]
    stack = () if None in layers else (kernel.shape[0],)
    gain = np.ones((*stack, size), np.float32)
    for layer, tensor in layers.items():
        if tensor.shape != ((1, size) if on_inputs else (size, 1)):
            raise ValueError(
                f"load_peft: {path}, layer {layer}: ia3_l {list(tensor.shape)} does not fit the "
                f"base's [in, out] of {list(kernel.shape[-2:])}. Is this the adapter's base model?"
            )
        gain[() if layer is None else layer] = tensor.reshape(-1)
    bias = None if on_inputs else bias_of(path, parameters, None)
    if bias is None:
        return path, IA3(base=kernel, gain=jnp.asarray(gain), on_inputs=on_inputs)
    return bias, IA3Bias(base=parameters[bias], gain=jnp.asarray(gain), kernel=path)
