"""Logits over a vocabulary, kept as what they are the product of until somebody needs them.

Of a language model they are by far the largest array: 8 texts of 2,048 tokens and 128,256 words
come to 8.4 GB. A loss needs them a piece at a time, and generation those of the last token alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lorax_ft.products import product, softcapped

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Logits:
    """Vectors, and the head that each is to be multiplied by."""

    x: Array  # [..., d]
    kernel: Any  # [d, vocabulary], or as a table of vectors [vocabulary, d]; an array or a leaf
    bias: Any = None  # [vocabulary]; an array or a leaf
    is_table: bool = dataclasses.field(default=False, metadata={"static": True})
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
    most_bytes: int = dataclasses.field(default=2**28, metadata={"static": True})
    """How much of them a loss may hold at once, on all devices together."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., vocabulary]`."""
        return (*self.x.shape[:-1], self.kernel.shape[0 if self.is_table else 1])

    def last(self) -> Logits:
        """Of `[batch, length, vocabulary]` those of the last place: `[batch, vocabulary]`."""
        return dataclasses.replace(self, x=self.x[:, -1])

    def dense(self) -> Array:
        """All of them, in float32. The head must be arrays, or leaves in a lifted function."""
        y = product(self.x, self.kernel.T if self.is_table else self.kernel, jnp.float32)
        if self.bias is not None:
            y = y + self.bias.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
        return y if self.softcap is None else softcapped(y, self.softcap)
