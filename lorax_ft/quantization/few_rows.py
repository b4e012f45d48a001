"""Products of few rows with a four-bit kernel: fused where a program is compiled for one GPU.

What a program is compiled for is known when it is lowered, also for devices that are not there. So
the product is a primitive of its own until then: for one CUDA device it becomes the kernel of
`lorax_ft.quantization.gpu_product`, anywhere else the product with the dequantised matrix.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from lorax_ft.quantization.tilings import tiling_of

Array = jax.Array

OLDEST_GPU = 8  # the first compute capability whose tensor cores know bfloat16


def serves(dot: Any, kernel: Any, x: Array) -> bool:
    """Whether `product` may be fused: what is known of it before it is known what it runs on."""
    mesh = jax.sharding.get_abstract_mesh()
    return (
        kernel.blocked
        and not dot.transposed
        and dot.precision is None
        and x.dtype == kernel.dtype == jnp.bfloat16
        and dot.preferred_element_type in (None, jnp.bfloat16)
        and (mesh.empty or mesh.size == 1)
        and tiling_of(math.prod(x.shape[:-1]), *_sizes(kernel)) is not None
    )


def product(dot: Any, kernel: Any, x: Array) -> Array:
    """`dot(x, kernel.matrix())` of a `FourBit` leaf, where `serves` says that it may be fused."""
    fields, structure = jax.tree.flatten(kernel)
    operands = map(jnp.asarray, (x.reshape(-1, x.shape[-1]), *fields))
    y = _product.bind(*operands, dot=dot, structure=structure)
    return y.reshape(*x.shape[:-1], -1)


# --- The primitive --------------------------------------------------------------------------------


def _plain(x: Array, *fields: Array, dot: Any, structure: Any) -> Array:
    return dot(x, jax.tree.unflatten(structure, fields).matrix())


def _fused(x: Array, *fields: Array, dot: Any, structure: Any) -> Array:
    from lorax_ft.quantization import gpu_product  # only here: Pallas takes a while to import

    del dot
    kernel = jax.tree.unflatten(structure, fields)
    tiling = tiling_of(x.shape[0], *_sizes(kernel))
    assert tiling is not None  # or `serves` had said no
    absmax = kernel.float_absmax()
    return gpu_product.product(
        x, kernel.packed, absmax, kernel.table, block_size=kernel.block_size, tiling=tiling
    )


def _sizes(kernel: Any) -> tuple[int, int, int]:
    return kernel.in_size, kernel.out_size, kernel.block_size


def _shape(x: Any, *fields: Any, dot: Any, structure: Any) -> ShapedArray:
    del dot
    return ShapedArray((x.shape[0], jax.tree.unflatten(structure, fields).out_size), x.dtype)


@functools.partial(jax.jit, static_argnames=("dot", "structure"))
def _compiled(*operands: Array, dot: Any, structure: Any) -> Array:
    return _product.bind(*operands, dot=dot, structure=structure)


def _batched(operands: Any, axes: Any, *, dot: Any, structure: Any) -> tuple[Array, int]:
    """Many inputs of one kernel are rows of one product; many kernels are left to XLA."""
    x, *fields = operands
    plain = functools.partial(_plain, dot=dot, structure=structure)
    if any(axis is not None for axis in axes[1:]):
        return jax.vmap(plain, in_axes=tuple(axes))(*operands), 0
    x = jnp.moveaxis(x, axes[0], 0)
    rows = x.reshape(-1, x.shape[-1])
    kernel = jax.tree.unflatten(structure, fields)
    y = product(dot, kernel, rows) if serves(dot, kernel, rows) else plain(rows, *fields)
    return y.reshape(*x.shape[:-1], -1), 0


def _for_cuda(context: mlir.LoweringRuleContext, *operands: Any, **parameters: Any) -> Any:
    function = _fused if _is_one_gpu(context) else _plain
    return mlir.lower_fun(function, multiple_results=False)(context, *operands, **parameters)


def _is_one_gpu(context: mlir.LoweringRuleContext) -> bool:
    """Whether a program is for one device, of CUDA alone, that has what the kernel needs."""
    module = context.module_context
    if len(module.platforms) != 1 or getattr(module.axis_context, "num_devices", None) != 1:
        return False
    (device,) = getattr(module.axis_context, "device_assignment", None) or (None,)
    capability = str(getattr(device, "compute_capability", OLDEST_GPU))
    return int(capability.partition(".")[0]) >= OLDEST_GPU and _has_triton()


def _has_triton() -> bool:
    """Whether jax's CUDA plugin is installed: without it Triton's kernels cannot be lowered."""
    from jaxlib import gpu_triton

    return hasattr(gpu_triton, "TritonKernel")


_product = Primitive("four_bit_product")
_product.def_impl(_compiled)
_product.def_abstract_eval(_shape)
batching.primitive_batchers[_product] = _batched
mlir.register_lowering(_product, mlir.lower_fun(_plain, multiple_results=False))
mlir.register_lowering(_product, _for_cuda, platform="cuda")
