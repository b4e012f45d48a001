"""Attention of queries to keys: one function that chooses a kernel, and the same numbers from all.

Plain products serve everywhere. cuDNN's kernel for NVIDIA's cards and splash attention for TPUs
keep no matrix of weights, which for long texts is most of what a layer takes; but neither knows
everything that a model may ask for, and then plain products are computed. A kernel is a file here
and a row of `KERNELS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax

from lorax_ft.models.attending import cudnn, plain, splash
from lorax_ft.models.attending.kernel import Kernel, Products, Seen, is_constant
from lorax_ft.models.layers import Array

KERNELS: Mapping[str, Kernel] = {
    "xla": plain.KERNEL,
    "cudnn": cudnn.KERNEL,
    "splash": splash.KERNEL,
}
OF_PLATFORM: Mapping[str, str] = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}


def attend(
    query: Array,
    key: Array,
    value: Array,
    seen: Seen = Seen(),
    products: Products = Products(),
    *,
    kernel: str = "xla",
    platform: str = "",
) -> Array:
    """Scaled dot-product attention: `[batch, length, heads, head_dim]` of queries to the same.

    `key` and `value` `[batch, keys, kv_heads, head_dim]` have fewer heads or as many. `kernel` is
    one of `KERNELS`, or "auto" for that of the platform, by default this process' own. A kernel
    that has not what a call asks for (dropout, a cache, keys of a prefix) leaves it to plain
    products; raises ValueError where one that was asked for by name has not what the model always
    needs. What comes out for a query that is padding differs between them.
    """
    if is_constant(seen.window) and seen.window >= key.shape[1]:
        seen = dataclasses.replace(seen, window=None)  # it hides nothing
    if kernel == "auto":
        kernel = OF_PLATFORM.get(platform or jax.default_backend(), "xla")
        one = KERNELS[kernel]
        call = query, key, seen, products
        usable = not one.lacks(query, seen, products) and one.serves(*call)
        kernel = kernel if usable and key.shape[1] >= one.shortest(*call) else "xla"
    elif reason := KERNELS[kernel].lacks(query, seen, products):
        raise ValueError(f"ComputeConfig.attention {kernel!r} knows no {reason}: say 'xla'.")
    elif not KERNELS[kernel].serves(query, key, seen, products):
        kernel = "xla"
    return KERNELS[kernel].attend(query, key, value, seen, products)


__all__ = ["KERNELS", "OF_PLATFORM", "Kernel", "Products", "Seen", "attend"]
