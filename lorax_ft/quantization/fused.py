"""Products with a four-bit kernel: fused where a program is compiled for one GPU or one TPU.

What a program is compiled for is known when it is lowered, also for devices that are not there. So
the product is a primitive of its own until then: for one CUDA device it becomes the kernel of
`lorax_ft.quantization.gpu_product`, where rows are few, for one TPU that of `tpu_product`, and
anywhere else the product with the dequantised matrix.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from lorax_ft.quantization.tilings import gpu_tiling, tpu_tiling

Array = jax.Array

OLDEST_GPU = 8  # the first compute capability whose tensor cores know bfloat16


def serves(dot: Any, kernel: Any, x: Array) -> bool:
    """Whether `product` may be fused: what is known of it before it is known what it runs on."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = math.prod(x.shape[:-1]), *_sizes(kernel)
    return (
        kernel.blocked
        and dot.precision is None
        and x.dtype == kernel.dtype == jnp.bfloat16
        and dot.preferred_element_type in (None, jnp.bfloat16)
        and (mesh.empty or mesh.size == 1)
        and (tpu_tiling(*sizes) or gpu_tiling(*sizes)) is not None
    )


def product(dot: Any, kernel: Any, x: Array) -> Array:
    """`dot(x, kernel.matrix())` of a `FourBit` leaf, where `serves` says that it may be fused."""
    fields, structure = jax.tree.flatten(kernel)
    operands = map(jnp.asarray, (x.reshape(-1, x.shape[-1]), *fields))
    y = product_p.bind(*operands, dot=dot, structure=structure)
    return y.reshape(*x.shape[:-1], -1)


# --- The primitive --------------------------------------------------------------------------------

product_p = Primitive("four_bit_product")


def _plain(x: Array, *fields: Array, dot: Any, structure: Any) -> Array:
    return dot(x, jax.tree.unflatten(structure, fields).matrix())


def _on_gpu(x: Array, *fields: Array, dot: Any, structure: Any) -> Array:
    from lorax_ft.quantization import gpu_product  # only here: Pallas takes a while to import

    kernel = jax.tree.unflatten(structure, fields)
    tiling = gpu_tiling(x.shape[0], *_sizes(kernel))
    if dot.transposed or tiling is None:
        return dot(x, kernel.matrix())
    absmax = kernel.float_absmax()
    return gpu_product.product(
        x, kernel.packed, absmax, kernel.table, block_size=kernel.block_size, tiling=tiling
    )


def _on_tpu(x: Array, *fields: Array, dot: Any, structure: Any) -> Array:
    from lorax_ft.quantization import tpu_product

    kernel = jax.tree.unflatten(structure, fields)
    tiling = tpu_tiling(x.shape[0], *_sizes(kernel))
    if tiling is None:
        return dot(x, kernel.matrix())
    return tpu_product.product(
        x,
        kernel.packed,
        kernel.float_absmax(),
        kernel.table,
        block_size=kernel.block_size,
        transposed=dot.transposed,
        tiling=tiling,
    )


def _sizes(kernel: Any) -> tuple[int, int, int]:
    return kernel.in_size, kernel.out_size, kernel.block_size


def _shape(x: Any, *fields: Any, dot: Any, structure: Any) -> ShapedArray:
    kernel = jax.tree.unflatten(structure, fields)
    return ShapedArray((x.shape[0], kernel.in_size if dot.transposed else kernel.out_size), x.dtype)


@functools.partial(jax.jit, static_argnames=("dot", "structure"))
def _compiled(*operands: Array, dot: Any, structure: Any) -> Array:
    return product_p.bind(*operands, dot=dot, structure=structure)


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


def _differentiated(primals: Any, tangents: Any, *, dot: Any, structure: Any) -> Any:
    """As XLA's product is: where the leaf's own backward pass is differentiated in turn."""
    plain = functools.partial(_plain, dot=dot, structure=structure)
    return jax.jvp(plain, primals, tuple(map(ad.instantiate_zeros, tangents)))


def _lowering(fused: Any, takes: Any) -> Any:
    """Rule for a platform: `fused` if `takes` says so of the one device that a program is for."""

    def lower(context: mlir.LoweringRuleContext, *operands: Any, **parameters: Any) -> Any:
        module = context.module_context
        is_one = len(module.platforms) == 1 and (
            getattr(module.axis_context, "num_devices", None) == 1
        )
        (device,) = getattr(module.axis_context, "device_assignment", None) or (None,)
        function = fused if is_one and takes(device) else _plain
        return mlir.lower_fun(function, multiple_results=False)(context, *operands, **parameters)

    return lower


def _has_tensor_cores(device: Any) -> bool:
    """Whether a GPU, None for one that is not known, and what is installed can run Triton's."""
    capability = str(getattr(device, "compute_capability", OLDEST_GPU))
    return int(capability.partition(".")[0]) >= OLDEST_GPU and _has_triton()


def _has_triton() -> bool:
    """Whether jax's CUDA plugin is installed: without it Triton's kernels cannot be lowered."""
    from jaxlib import gpu_triton

    return hasattr(gpu_triton, "TritonKernel")


product_p.def_impl(_compiled)
product_p.def_abstract_eval(_shape)
batching.primitive_batchers[product_p] = _batched
ad.primitive_jvps[product_p] = _differentiated
mlir.register_lowering(product_p, mlir.lower_fun(_plain, multiple_results=False))
mlir.register_lowering(product_p, _lowering(_on_gpu, _has_tensor_cores), platform="cuda")
mlir.register_lowering(product_p, _lowering(_on_tpu, lambda device: True), platform="tpu")
