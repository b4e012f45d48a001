"""What the model families share: products, embeddings, norms, activations, dropout, depth.

Parameters are plain arrays, and every kernel `[d_in, d_out]` or table `[vocabulary, d]` meets its
activations in one `dot_general` or `take`, after at most a cast or a transpose: what a parameter
stands for may then be replaced by anything that can do these two.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lorax_ft.axes import ROWS, even
from lorax_ft.leaves import PRODUCT
from lorax_ft.products import product
from lorax_ft.quantization import fused

Array = jax.Array
PyTree = Any

LAYER_INPUT = "layer_input"  # what `layer_input` calls it


def _of_products(policy: Callable[..., Any]) -> Callable[..., Any]:
    """A policy of matrix products, which takes one with a four-bit kernel for what it is."""

    def of_products(primitive: Any, *shapes: Any, **parameters: Any) -> Any:
        if primitive is fused.product_p:
            axes = ((1,), (1 if parameters["dot"].transposed else 0,)), ((), ())
            primitive, parameters = lax.dot_general_p, {"dimension_numbers": axes}
        return policy(primitive, *shapes, **parameters)

    return of_products


def _keep_products(primitive: Any, *shapes: Any, **parameters: Any) -> Any:
    """What is called `PRODUCT`, and what cuDNN's attention gives, which nobody can give a name: its
    output and the sums of its softmax."""
    of_cudnn = primitive.name.startswith("dot_product_attention_fwd")
    return of_cudnn or _named_products(primitive, *shapes, **parameters)


_policies = jax.checkpoint_policies
_named_products = _policies.save_only_these_names(PRODUCT)

# What the backward pass may keep of a layer instead of computing it again; None keeps everything.
# With "full" that is the layer's input alone; "offload" keeps it in the host's memory, and
# "offload_dots" what the products with kernels made, too. "products" keeps what products with
# kernels give, what goes into attention and what comes out: not what is quick to compute from that,
# such as norms, activations and the weights of attention.
REMAT_POLICIES: Mapping[str, Callable[..., Any] | None] = {
    "none": None,
    "full": _policies.nothing_saveable,
    "dots": _of_products(_policies.checkpoint_dots),
    "dots_without_batch": _of_products(_policies.checkpoint_dots_with_no_batch_dims),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "offload_dots": _of_products(_policies.offload_dot_with_no_batch_dims("device", "pinned_host")),
    "products": _keep_products,
}

# How attention is computed: see `attending.KERNELS`; "auto" chooses for the platform.
ATTENTIONS = ("auto", "xla", "cudnn", "splash")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a model is computed; what it computes does not depend on it, but for rounding."""

    dtype: str = "float32"  # of activations and products; norms, softmax and logits are float32
    param_dtype: str = "float32"
    scan_layers: bool = True  # one compiled layer over stacked arrays, or each layer its own arrays
    remat: str = "none"  # a key of REMAT_POLICIES; on CPUs it spares memory of scanned layers alone
    attention: str = "auto"  # one of ATTENTIONS
    platform: str = ""  # "cpu", "gpu" or "tpu": what is compiled for, where it is not this process'
    right_padded: bool = False  # attention masks hide ends of texts alone, as the loader's do
    logits_bytes: int = 2**28  # of a vocabulary's logits that a device holds at once for a loss

    def __post_init__(self):
        if self.logits_bytes < 1:
            raise ValueError(
                f"ComputeConfig.logits_bytes must be at least 1, got {self.logits_bytes}: raise it "
                "to what a device may hold of them, such as 2**28."
            )
        for field in ("dtype", "param_dtype"):
            name = getattr(self, field)
            if name not in ("float32", "bfloat16", "float16"):
                raise ValueError(
                    f"ComputeConfig.{field} must be 'float32', 'bfloat16' or 'float16', "
                    f"got {name!r}."
                )
        for field, table in (("remat", REMAT_POLICIES), ("attention", ATTENTIONS)):
            if getattr(self, field) not in table:
                raise ValueError(
                    f"ComputeConfig.{field} must be one of {', '.join(map(repr, table))}, "
                    f"got {getattr(self, field)!r}."
                )


# --- Products and embeddings ----------------------------------------------------------------------


class Dense(nn.Module):
    """`x @ kernel + bias`: `[..., d_in]` to `[..., features]`."""

    features: int
    compute: ComputeConfig
    use_bias: bool = True
    stddev: float = 0.02  # of the initial kernel
    out_dtype: Any = None  # the compute dtype where None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype, param_dtype = jnp.dtype(self.compute.dtype), jnp.dtype(self.compute.param_dtype)
        kernel = self.param(
            "kernel", nn.initializers.normal(self.stddev), (x.shape[-1], self.features), param_dtype
        )
        y = product(x.astype(dtype), kernel.astype(dtype), self.out_dtype or dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), param_dtype)
            y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return checkpoint_name(y, PRODUCT)


def head(features: int, compute: ComputeConfig, stddev: float, name: str) -> Dense:
    """A layer without bias that makes float32 logits."""
    return Dense(features, compute, use_bias=False, stddev=stddev, out_dtype=jnp.float32, name=name)


class Embedding(nn.Module):
    """A table of vectors, looked up by number."""

    size: int
    features: int
    compute: ComputeConfig
    stddev: float = 0.02

    def setup(self):
        self.embedding = self.param(
            "embedding",
            nn.initializers.normal(self.stddev),
            (self.size, self.features),
            jnp.dtype(self.compute.param_dtype),
        )

    def __call__(self, ids: Array) -> Array:
        """Ids `[...]` to vectors `[..., features]`; NaN where an id is beyond the table."""
        return jnp.take(self.embedding, ids, axis=0).astype(self.compute.dtype)


# --- Norms, activations, dropout ------------------------------------------------------------------


class LayerNorm(nn.Module):
    """Layer normalisation, in float32 (Ba et al. 2016)."""

    epsilon: float
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        param_dtype = jnp.dtype(self.compute.param_dtype)
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], param_dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], param_dtype)
        centred = x.astype(jnp.float32)
        centred = centred - centred.mean(-1, keepdims=True)
        y = centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        return (y * _row(scale, y.ndim) + _row(bias, y.ndim)).astype(self.compute.dtype)


class RMSNorm(nn.Module):
    """Normalisation by the root mean square, in float32 (Zhang & Sennrich 2019)."""

    epsilon: float
    compute: ComputeConfig
    offset: float = 0.0  # added to the scale; with 1 a scale of zeros changes nothing

    @nn.compact
    def __call__(self, x: Array) -> Array:
        param_dtype = jnp.dtype(self.compute.param_dtype)
        start = nn.initializers.constant(1 - self.offset)
        scale = self.param("scale", start, x.shape[-1:], param_dtype)
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        weight = _row(scale, y.ndim)
        return (y * (self.offset + weight if self.offset else weight)).astype(self.compute.dtype)


def gelu(x: Array) -> Array:
    """The exact GELU, by `erf`: `jax.nn.gelu` uses `erfc`, which XLA:CPU computes more slowly."""
    return x * (0.5 + 0.5 * lax.erf(x * math.sqrt(0.5)))


# By transformers' names.
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def activate(x: Array, name: str) -> Array:
    """The activation of that name, computed in float32.

    In half precision gradients compute it again, from `x`: its steps between are twice as large.
    """

    def in_float32(x: Array) -> Array:
        return ACTIVATIONS[name](x.astype(jnp.float32)).astype(x.dtype)

    return in_float32(x) if x.dtype == jnp.float32 else jax.checkpoint(in_float32)(x)


def gated(gate: Array, up: Array, name: str) -> Array:
    """`activation(gate) * up` (Shazeer 2020), computed in float32.

    In half precision gradients compute it again, from `gate` and `up`, in one pass over both.
    """
    return (_in_float32 if gate.dtype == jnp.float32 else _gated)(name, gate, up)


def _in_float32(name: str, gate: Array, up: Array) -> Array:
    y = ACTIVATIONS[name](gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return y.astype(gate.dtype)


_gated = jax.custom_vjp(_in_float32, nondiff_argnums=(0,))


def _gated_forward(name: str, gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return _gated(name, gate, up), (gate, up)


def _gated_backward(name: str, inputs: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    # Behind a barrier, or steps of the forward pass would be kept in float32 instead.
    inputs, gradient = lax.optimization_barrier((inputs, gradient))
    _, pull = jax.vjp(functools.partial(_in_float32, name), *inputs)
    return pull(gradient)


_gated.defvjp(_gated_forward, _gated_backward)


def dropout(module: nn.Module, x: Array, rate: float) -> Array:
    """Zeroes each number with probability `rate`, where `module` has a key named "dropout"."""
    key = dropout_key(module, rate)
    return x if key is None else drop(x, rate, key)


def dropout_key(module: nn.Module, rate: float) -> Array | None:
    """A key of `module`'s own for dropout at a rate; None where nothing is to be dropped."""
    return module.make_rng("dropout") if rate > 0 and module.has_rng("dropout") else None


def drop(x: Array, rate: float, key: Array) -> Array:
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))


def last_token(x: Array, input_ids: Array, mask: Array | None, pad_token_id: int | None) -> Array:
    """Of `[batch, length, d]` what stands at each sequence's last token that is not padding.

    Padding is what the mask `[batch, length]` says and, as in transformers, whatever has the id
    `pad_token_id`; of a sequence that is all padding it is the first. The result is `[batch, d]`.
    """
    is_token = jnp.ones(input_ids.shape, bool)
    if mask is not None:
        is_token &= mask.astype(bool)
    if pad_token_id is not None:
        is_token &= input_ids != pad_token_id
    last = jnp.where(is_token, jnp.arange(input_ids.shape[1])[None], 0).max(axis=1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


def _row(vector: Array, ndim: int) -> Array:
    return vector.astype(jnp.float32).reshape((1,) * (ndim - 1) + (-1,))


# --- Depth ----------------------------------------------------------------------------------------


def run_layers(
    layer: type[nn.Module],
    config: Any,
    compute: ComputeConfig,
    x: Array,
    by_layer: PyTree,
    *inputs: Any,
) -> Array:
    """Runs `config.num_hidden_layers` times `x, _ = layer(config, compute)(x, own, *inputs)`.

    `own` is a layer's slice of the arrays of `by_layer` `[layers, ...]`, a tree that may be empty;
    the other inputs are the same for all. Call it inside a compact method. The parameters are
    stacked at `layers/...`, or each layer's own at `layers_0/...`, `layers_1/...`, as
    `compute.scan_layers` says.
    """
    policy = REMAT_POLICIES[compute.remat]
    if policy is not None:
        layer = nn.remat(layer, policy=policy, prevent_cse=not compute.scan_layers)
    if not compute.scan_layers:
        for i in range(config.num_hidden_layers):
            own = jax.tree.map(lambda array, i=i: array[i], by_layer)
            x, _ = layer(config, compute, name=f"layers_{i}")(x, own, *inputs)
        return x
    scanned = nn.scan(
        layer,
        variable_axes={"params": 0, "cache": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, *(nn.broadcast,) * len(inputs)),  # pyright: ignore[reportArgumentType]
        length=config.num_hidden_layers,
    )
    by_layer = jax.tree.map(jnp.asarray, by_layer)
    x, _ = scanned(config, compute, name="layers")(x, by_layer, *inputs)
    return x


def layer_input(x: Array) -> Array:
    """`x` `[batch, length, d]`, by a name that a policy of `REMAT_POLICIES` may know; each layer
    begins with it.

    On the context's mesh the devices have rows of the batch and whole vectors. Left to itself XLA
    may split vectors as tables of them are split, and then sends all the activations of a layer
    where its kernel should be sent.
    """
    return checkpoint_name(_by_rows(x), LAYER_INPUT)


def _by_rows(x: Array) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    rows = tuple(axis for axis in ROWS if axis in mesh.shape)
    if math.prod(mesh.shape[axis] for axis in rows) == 1 or x.ndim != 3:
        return x
    rows = even(PartitionSpec(rows), x.shape, mesh)[0]
    return lax.with_sharding_constraint(x, PartitionSpec(rows, PartitionSpec.UNCONSTRAINED, None))


def stack_layers(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """`layers_0`, `layers_1`, ... as one `layers`, stacked: what `scan_layers=True` reads."""
    params = {n: stack_layers(v) if isinstance(v, Mapping) else v for n, v in params.items()}
    count = sum(name.startswith("layers_") for name in params)
    if not count:
        return params
    layers = [params[f"layers_{i}"] for i in range(count)]
    others = {name: value for name, value in params.items() if not name.startswith("layers_")}
    return {**others, "layers": jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)}


def unstack_layers(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The inverse of `stack_layers`: what `scan_layers=False` reads."""
    params = {n: unstack_layers(v) if isinstance(v, Mapping) else v for n, v in params.items()}
    if "layers" not in params:
        return params
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    layers = {
        f"layers_{i}": jax.tree.map(lambda array, i=i: array[i], params["layers"])
        for i in range(count)
    }
    return {**{name: value for name, value in params.items() if name != "layers"}, **layers}
