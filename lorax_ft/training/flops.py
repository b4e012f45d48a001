"""Arithmetic of a step, counted in its jaxpr, and the peaks of known devices.

XLA's own cost analysis counts the body of a loop once, so it would miss all but one of the scanned
layers; here a scan counts as often as it runs. Attention counts the same whatever computes it: two
products of all queries with all keys forward and four backward, as plain products have them, and
as in PaLM's model FLOPs utilisation (Chowdhery et al. 2022, appendix B). What a kernel leaves out,
such as the half that a causal mask hides, is not taken off, nor do scores count that it computes
again backward.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from lorax_ft import jaxprs
from lorax_ft.devices import by_device_kind

# Dense bfloat16 FLOP/s of one device as `Device.device_kind` names it.
PEAK_FLOPS = {kind: device.flops for kind, device in by_device_kind().items()}

# Parts of attention by kernels, of which cuDNN's are primitives and splash attention's are in
# Pallas: how many products of all queries with all keys each stands for, over the size of a key and
# over the size of a value.
_ATTENTION = {"fwd": (1, 1), "bwd": (2, 2), "dq": (1, 0), "dkv": (1, 2)}
_CUDNN = re.compile(r"dot_product_attention_(fwd|bwd)")
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")


def peak_flops(device: Any) -> float | None:
    """The device's peak, or None where it is not known, as for every CPU."""
    return PEAK_FLOPS.get(device.device_kind)


def count_flops(jaxpr: Any) -> float:
    """FLOPs of the matrix products and convolutions of a jaxpr, one multiply-add being two; of all
    devices together.

    Everything that a result needs counts, also what `remat` computes again. A `while` counts once
    and a `cond` as its dearest branch; kernels written in Pallas count nothing but for splash
    attention.

    >>> import jax
    >>> x, w = jax.numpy.ones((8, 4)), jax.numpy.ones((4, 2))
    >>> count_flops(jax.jit(lambda x, w: x @ w).trace(x, w).jaxpr)
    128.0
    """
    return float(_sum(jaxprs.live(jaxpr)))


def _sum(jaxpr: Any) -> float:
    return sum(map(_flops, jaxprs.inner(jaxpr)[0].eqns))


def _flops(equation: Any) -> float:
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2.0 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * equation.outvars[0].aval.size * kernel.size / features
    if name == "four_bit_product":  # of x [n, in] and fields of a kernel
        return 2.0 * equation.invars[0].aval.size * equation.outvars[0].aval.shape[1]
    if name == "pallas_call":
        return _splash_flops(equation)
    if part := _CUDNN.match(name):
        query, key, value = (operand.aval for operand in equation.invars[:3])
        keys = key.shape[1 + equation.params["layout"]]  # behind the heads where that is 1
        return _attention_flops(part.group(1), query, keys, value.shape[-1])
    inner = [_sum(jaxpr) for jaxpr in _inner(equation.params)]
    if name == "cond":
        return max(inner)
    if name == "scan":
        return equation.params["length"] * sum(inner)
    if name == "shard_map":  # its body is what one device does of the axes that it names
        sizes, axes = equation.params["mesh"].shape, equation.params["newly_manual_axes"]
        return math.prod(sizes[axis] for axis in axes) * sum(inner)
    return sum(inner)


def _splash_flops(equation: Any) -> float:
    """Of a kernel in Pallas, nothing where it is not splash attention's."""
    part = _SPLASH.match(str(equation.params.get("name")))
    if part is None:
        return 0.0
    # [..., heads, places, size] each, behind what tells of the mask in integers
    floats = [x.aval for x in equation.invars if jnp.issubdtype(x.aval.dtype, jnp.floating)]
    query, key, value = floats[:3]
    return _attention_flops(part.group(1), query, key.shape[-2], value.shape[-1])


def _attention_flops(part: str, query: Any, keys: int, value_size: int) -> float:
    by_key, by_value = _ATTENTION[part]
    size = query.shape[-1]
    return 2.0 * (query.size // size) * keys * (by_key * size + by_value * value_size)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                yield item
