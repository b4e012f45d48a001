"""Products with a four-bit kernel: fused where a program is compiled for a GPU or for TPUs.

What a program is compiled for is known when it is lowered, also for devices that are not there. So
the product is a primitive of its own until then: for a CUDA device it becomes the kernel of
`lorax_ft.quantization.gpu_product`, where rows are few, for a TPU that of `tpu_product`, and
anywhere else the product with the dequantised matrix.

No compiler splits such a kernel over devices. On a mesh of TPUs each device runs its own, on the
part of the matrix that `within_product` gives it; other meshes are left to XLA.
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
from jax.sharding import Mesh, PartitionSpec

from lorax_ft.axes import ROWS, SEQUENCE
from lorax_ft.quantization.tilings import gpu_tiling, tpu_tiling

Array = jax.Array

OLDEST_GPU = 8  # the first compute capability whose tensor cores know bfloat16


def product(dot: Any, kernel: Any, x: Array) -> Array | None:
    """`dot(x, kernel.matrix())` of a `FourBit` leaf, which may be fused; None where it cannot be,
    as far as that is known before it is known what the program runs on."""
    rows = x.reshape(-1, x.shape[-1])
    product = _in_whole if kernel.within_product is None else _in_parts
    y = product(dot, kernel, rows) if _is_plain(dot, kernel, x) else None
    return None if y is None else y.reshape(*x.shape[:-1], -1)


def _is_plain(dot: Any, kernel: Any, x: Array) -> bool:
    """Whether it is a product in bfloat16, as those of the kernels are."""
    return (
        kernel.blocked
        and dot.precision is None
        and x.dtype == kernel.dtype == jnp.bfloat16
        and dot.preferred_element_type in (None, jnp.bfloat16)
    )


def _in_whole(dot: Any, kernel: Any, rows: Array) -> Array | None:
    """On one device, or on each device's part of arrays."""
    mesh, sizes = jax.sharding.get_abstract_mesh(), (len(rows), *_sizes(kernel))
    is_one = mesh.empty or mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)
    if not is_one or (tpu_tiling(*sizes) or gpu_tiling(*sizes)) is None:
        return None
    fields, structure = jax.tree.flatten(kernel)
    return product_p.bind(rows, *map(jnp.asarray, fields), dot=dot, structure=structure)


def _in_parts(dot: Any, kernel: Any, rows: Array) -> Array | None:
    """On a mesh, whose devices have their own rows, and their own part of the matrix, too, where
    `within_product` splits it: over its outputs, or over what is summed."""
    mesh, spec = kernel.within_product.mesh, kernel.within_product.spec
    along_rows = tuple(name for name in ROWS if name in mesh.shape)
    count = functools.partial(_count, mesh)
    _, inputs, outputs = kernel.matrix_specs(spec)
    parts = count(along_rows), count(inputs), count(outputs)
    sizes = len(rows), kernel.in_size, kernel.out_size
    divide = not any(size % part for size, part in zip(sizes, parts))
    rows_of, in_size, out_size = (size // part for size, part in zip(sizes, parts))
    tiling = tpu_tiling(rows_of, in_size, out_size, kernel.block_size)
    if not (_runs_kernels(mesh) and divide and tiling) or count(SEQUENCE) > 1:
        return None
    kernel = kernel.gathered()
    # absmax in float32: what is quantised in turn has blocks that no axis splits
    part = kernel.replace(
        absmax=kernel.float_absmax(),
        nested_absmax=None,
        offset=None,
        kernel_shape=(in_size, out_size),
        kernel_in_axes=(-2,),
        within_product=None,
    )
    summed, made = (outputs, inputs) if dot.transposed else (inputs, outputs)

    def multiply(rows: Array, part: Any) -> Array:
        y = _in_whole(dot, part, rows)
        assert y is not None  # for the tiling was found
        return y if summed is None else jax.lax.psum(y, summed)

    return jax.shard_map(
        multiply,
        mesh=mesh,
        in_specs=(PartitionSpec(along_rows, summed), PartitionSpec(inputs, outputs)),
        out_specs=PartitionSpec(along_rows, made),
        check_vma=False,
    )(rows, part)


def _runs_kernels(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "tpu"


def _count(mesh: Mesh, names: Any) -> int:
    names = (names,) if isinstance(names, str) else names or ()
    return math.prod(mesh.shape.get(name, 1) for name in names)


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
    y = _in_whole(dot, kernel, rows)
    y = plain(rows, *fields) if y is None else y
    return y.reshape(*x.shape[:-1], -1), 0


def _differentiated(primals: Any, tangents: Any, *, dot: Any, structure: Any) -> Any:
    """As XLA's product is: where the leaf's own backward pass is differentiated in turn."""
    plain = functools.partial(_plain, dot=dot, structure=structure)
    return jax.jvp(plain, primals, tuple(map(ad.instantiate_zeros, tangents)))


def _lowering(fused: Any, takes: Any) -> Any:
    """Rule for a platform: `fused` if `takes` says so of the device that a program is for."""

    def lower(context: mlir.LoweringRuleContext, *operands: Any, **parameters: Any) -> Any:
        module = context.module_context
        (device, *_) = getattr(module.axis_context, "device_assignment", None) or (None,)
        function = fused if _runs_alone(module) and takes(device) else _plain
        return mlir.lower_fun(function, multiple_results=False)(context, *operands, **parameters)

    return lower


def _runs_alone(module: mlir.ModuleContext) -> bool:
    """Whether there is one device, or each has its own part of the arrays already."""
    place: Any = module.axis_context
    manual = getattr(place, "manual_axes", None)
    is_own = getattr(place, "num_devices", None) == 1 or (
        bool(manual) and set(manual) == set(place.mesh.axis_names)
    )
    return len(module.platforms) == 1 and is_own


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
