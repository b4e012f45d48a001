"""Products with kernels that are as fast backwards as forwards, and the cap of what they make."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def product(x: Array, kernel: Array, dtype: Any) -> Array:
    """`x @ kernel` in `dtype`, which is that of `x` or float32: `[..., d_in]` by `[d_in, d_out]`.

    Leading axes are flattened first: the kernel's gradient is then a plain matrix product, which
    XLA:CPU computes half as fast again as one that contracts several axes.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = rows @ kernel if dtype == x.dtype else einsum_float32("nd,df->nf", rows, kernel)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def einsum_float32(equation: str, x: Array, y: Array) -> Array:
    """An einsum in float32 whose gradients are products in the dtype of `x` and `y`.

    JAX's own gradient of it would multiply float32 by half precision, which no tensor core does.
    """
    if x.dtype == jnp.float32:
        return jnp.einsum(equation, x, y)
    return _widened_einsum(equation, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _widened_einsum(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _widened_einsum_forward(equation: str, x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return _widened_einsum(equation, x, y), (x, y)


def _widened_einsum_backward(
    equation: str, operands: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, y = operands
    gradient = gradient.astype(x.dtype)
    (of_x,) = jax.linear_transpose(lambda x: jnp.einsum(equation, x, y), x)(gradient)
    (of_y,) = jax.linear_transpose(lambda y: jnp.einsum(equation, x, y), y)(gradient)
    return of_x, of_y


_widened_einsum.defvjp(_widened_einsum_forward, _widened_einsum_backward)


def softcapped(x: Array, cap: float) -> Array:
    """`cap * tanh(x / cap)`: near x where it is small, never beyond the cap."""
    return cap * jnp.tanh(x / cap)
