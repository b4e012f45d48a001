"""How low-rank factors start: as Hugging Face PEFT does, Gaussian, PiSSA, OLoRA or LoftQ.

Each function takes a weight as a matrix `[in, out]` and gives `(base, a [rank, in], b [rank, out])`
with `base + scale * a.T @ b` equal, or for LoftQ close, to the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def kaiming(key: Array, rank: int, in_size: int, out_size: int, dtype: Any) -> tuple[Array, Array]:
    """`a` uniform in +-1/sqrt(in) (torch's kaiming_uniform with a = sqrt 5), `b` zero: PEFT's
    default."""
    bound = 1.0 / math.sqrt(in_size)
    a = jax.random.uniform(key, (rank, in_size), jnp.float32, -bound, bound)
    return a.astype(dtype), jnp.zeros((rank, out_size), dtype)


def gaussian(key: Array, rank: int, in_size: int, out_size: int, dtype: Any) -> tuple[Array, Array]:
    """`a` normal with deviation 1/rank, `b` zero."""
    a = jax.random.normal(key, (rank, in_size), jnp.float32) / rank
    return a.astype(dtype), jnp.zeros((rank, out_size), dtype)


def embedding(
    key: Array, rank: int, in_size: int, out_size: int, dtype: Any
) -> tuple[Array, Array]:
    """For look-up tables, as PEFT: `a` zero, `b` standard normal."""
    b = jax.random.normal(key, (rank, out_size), jnp.float32)
    return jnp.zeros((rank, in_size), dtype), b.astype(dtype)


RANDOM: dict[str, Callable[..., tuple[Array, Array]]] = {"default": kaiming, "gaussian": gaussian}
"""Starts that leave the base alone; they need no values, so they work on shapes too."""


def pissa(weight: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The principal singular directions to the factors, the rest to the base (Meng et al. 2024)."""
    a, b = _truncated_svd(weight, rank, scale)
    return weight - scale * (a.T @ b), a, b


def olora(weight: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first columns of a QR decomposition of `weight.T` to the factors (Buyukakyuz 2024)."""
    q, r = np.linalg.qr(weight.T)
    a, b = r[:rank], q[:, :rank].T
    return weight - scale * (a.T @ b), a, b


DECOMPOSITIONS = {"pissa": pissa, "olora": olora}
"""Starts that move part of a float base into the factors."""


def loftq(
    weight: np.ndarray,
    rank: int,
    scale: float,
    quantize: Callable[[np.ndarray], Any],
    iterations: int,
) -> tuple[Any, np.ndarray, np.ndarray]:
    """A quantised base and factors that make up for its error, by turns (Li et al. 2023, algorithm
    1)."""
    a = np.zeros((rank, weight.shape[0]), np.float32)
    b = np.zeros((rank, weight.shape[1]), np.float32)
    base = None
    for _ in range(iterations):
        base = quantize(weight - scale * (a.T @ b))
        a, b = _truncated_svd(weight - np.asarray(base.dense(), np.float32), rank, scale)
    return base, a, b


def _truncated_svd(weight: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) with `scale * a.T @ b` the best approximation of `weight` of this rank."""
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    root = np.sqrt(s[:rank] / scale)
    return (u[:, :rank] * root).T, root[:, None] * vt[:rank]
