"""Heads over a vocabulary: a kernel of their own, or the table of the words' vectors."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from lorax_ft.logits import Logits
from lorax_ft.models.layers import Array, ComputeConfig, Embedding


class Head(nn.Module):
    """A kernel `[d, features]` without bias that makes logits of `[..., d]`."""

    features: int
    compute: ComputeConfig
    stddev: float = 0.02  # of the initial kernel

    @nn.compact
    def __call__(self, x: Array) -> Logits:
        dtype, param_dtype = jnp.dtype(self.compute.dtype), jnp.dtype(self.compute.param_dtype)
        kernel = self.param(
            "kernel", nn.initializers.normal(self.stddev), (x.shape[-1], self.features), param_dtype
        )
        x, kernel = x.astype(dtype), kernel.astype(dtype)
        return Logits(x=x, kernel=kernel, most_bytes=self.compute.logits_bytes)


def tied(embedding: Embedding, x: Array) -> Logits:
    """Logits of `[..., d]` by the vectors of the words themselves."""
    compute = embedding.compute
    dtype = jnp.dtype(compute.dtype)
    x, table = x.astype(dtype), embedding.embedding.astype(dtype)
    return Logits(x=x, kernel=table, is_table=True, most_bytes=compute.logits_bytes)
