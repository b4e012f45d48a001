"""Many adapters on one base: named, swapped without a compile, and mixed within one batch.

    adapters = stack_adapters({"en": params_en, "de": params_de})   # LoRA on the same base
    lift(apply)(select(adapters, "de"), inputs)                     # one program for every name
    index = adapter_index(adapters, ["en", "de", None, "de"])       # None: the base alone
    lift(apply)(mix(adapters, index), inputs)                       # four examples, one batch

An index belongs to exactly the examples that the model is given. A training step therefore takes it
with the batch, as one more of its arrays: `index_from_inputs(apply)` is the `apply` for that, with
which a batch may also be cut up for gradient accumulation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_ft import trees
from lorax_ft.jaxprs import is_concrete
from lorax_ft.leaves import Array
from lorax_ft.methods.agreement import check_agreement
from lorax_ft.methods.lora_leaf import LoRA
from lorax_ft.methods.mixed_lora import NO_ADAPTER, MixedLoRA


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["params", "own"], meta_fields=["names"]
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSet:
    """Named adapters on one base, as a pytree.

    After training a mix, `dataclasses.replace(adapters, params=trained)` is the set of what was
    trained.
    """

    names: tuple[str, ...]
    params: Any  # the base's tree, with a MixedLoRA leaf where the adapters have LoRA leaves
    own: dict[str, Array]  # plain arrays in which they differ, by path: [adapters, *shape]


def stack_adapters(adapters: Mapping[str, Any]) -> AdapterSet:
    """The set of several params trees, each with LoRA leaves on the same parameters of one base.

    Ranks may differ: lower ones are padded with rows of zeros. Arrays of the base are shared, not
    copied. Plain arrays may differ too, such as a classifier trained with its adapter: `select`
    gives each adapter its own. Raises ValueError naming the parameter where the adapters have
    different targets, bases, shapes or dtypes, or leaves other than LoRA.

    >>> from lorax_ft import LoraConfig, add_lora
    >>> base = {"up": {"kernel": jnp.eye(4)}}
    >>> add = lambda rank: add_lora(base, LoraConfig(targets=("up",), rank=rank), jax.random.key(0))
    >>> adapters = stack_adapters({"en": add(2), "de": add(3)})
    >>> adapters.params["up"]["kernel"].a.shape
    (2, 3, 4)
    >>> adapter_index(adapters, ["de", None, "en"])
    array([ 1, -1,  0], dtype=int32)
    >>> select(adapters, "de")["up"]["kernel"].a.shape
    (3, 4)
    """
    targets, different = check_agreement(adapters, field="stack_adapters")
    parameters = [trees.flatten(params) for params in adapters.values()]
    mixed = {path: _stacked([p[path] for p in parameters]) for path in targets}
    own = {path: jnp.stack([p[path] for p in parameters]) for path in different}
    first = next(iter(adapters.values()))
    return AdapterSet(names=tuple(adapters), params=trees.with_fields(first, mixed), own=own)


def select(adapters: AdapterSet, name: str) -> Any:
    """The params with the LoRA leaves of one adapter of the set.

    Every adapter of a set gives the same tree structure, shapes and dtypes, so a compiled function
    takes any of them. Raises ValueError for a name that is not in the set.
    """
    position = _position(adapters, name)
    params = trees.with_fields(
        adapters.params, {path: array[position] for path, array in adapters.own.items()}
    )
    return _map_mixed(lambda leaf: _single(leaf, position), params)


def adapter_index(adapters: AdapterSet, names: Sequence[str | None]) -> np.ndarray:
    """The index `[batch]` int32 for `mix`, from the name of each example's adapter; None: no
    adapter.

    Raises ValueError for a name that is not in the set.
    """
    numbers = [NO_ADAPTER if name is None else _position(adapters, name) for name in names]
    return np.array(numbers, np.int32)


def mix(adapters: AdapterSet, index: Any) -> Any:
    """Params with which example i of a batch is computed by adapter `index[i]`, or by the base
    alone where that is -1.

    `index` is `[batch]`, integers. Raises ValueError where it holds a number of no adapter, which
    on traced values cannot be seen and gives NaN instead; and where the adapters differ in plain
    arrays, which have no per-example form.
    """
    if adapters.own:
        raise ValueError(
            f"mix: the adapters differ in {next(iter(adapters.own))}, which is no LoRA leaf and is "
            "the same for all examples of a batch. Put LoRA on it, share it, or use select."
        )
    return set_index(adapters.params, index)


def set_index(params: Any, index: Any) -> Any:
    """Params whose MixedLoRA leaves give example i of the next batch to adapter `index[i]`.

    `index` is `[batch]`, integers, -1 for the base alone. Raises ValueError where it holds a number
    of no adapter and is not traced.
    """
    index = check_index(index, _adapter_count(params))

    def chosen(leaf: MixedLoRA) -> MixedLoRA:
        return leaf.replace(index=jnp.broadcast_to(index, (*leaf.stack_shape, *index.shape)))

    return _map_mixed(chosen, params)


def repeat_index(params: Any, count: int) -> Any:
    """Params for a batch in which every example stands `count` times in a row, as beams do."""

    def repeated(leaf: MixedLoRA) -> MixedLoRA:
        index = leaf.index
        return leaf if index is None else leaf.replace(index=jnp.repeat(index, count, axis=-1))

    return _map_mixed(repeated, params)


def index_from_inputs(apply: Callable[..., Any], name: str = "adapter") -> Callable[..., Any]:
    """`apply(params, inputs, ...)` whose inputs, a dictionary of arrays `[batch, ...]`, also hold
    the adapter index `[batch]` under `name`.

    `apply` is lifted, and does not see the index. Raises ValueError where the inputs hold no such
    array, and where another of them is not as long.
    """

    @functools.wraps(apply)
    def indexed(params: Any, inputs: Mapping[str, Any], *rest: Any, **options: Any) -> Any:
        if name not in inputs:
            raise ValueError(f"index_from_inputs: the inputs {sorted(inputs)} hold no {name!r}.")
        index = inputs[name]
        others = {key: value for key, value in inputs.items() if key != name}
        for key, value in others.items():
            if value.shape[0] != index.shape[0]:
                raise ValueError(
                    f"index_from_inputs: {key} is {list(value.shape)} and {name} "
                    f"{list(index.shape)}; expected one adapter for each example."
                )
        return apply(set_index(params, index), others, *rest, **options)

    return indexed


def check_index(index: Any, adapters: int) -> Array:
    """The index as an int32 array `[batch]`.

    Raises ValueError where it is no vector of integers, and, of an index that is not traced, for a
    number that is neither -1 nor one of `adapters`, naming the first.
    """
    array = jnp.asarray(index)
    if array.ndim != 1 or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"index: got {array.dtype} {list(array.shape)}; expected [batch] integers, one adapter "
            "for each example."
        )
    if is_concrete(array):
        numbers = np.asarray(array)
        wrong = np.flatnonzero((numbers < NO_ADAPTER) | (numbers >= adapters))
        if wrong.size:
            raise ValueError(
                f"index: example {wrong[0]} has adapter {numbers[wrong[0]]}; expected 0 to "
                f"{adapters - 1}, or -1 for the base alone."
            )
    return array.astype(jnp.int32)


def _position(adapters: AdapterSet, name: str) -> int:
    if name not in adapters.names:
        near = trees.nearest(name, adapters.names) or adapters.names
        raise ValueError(f"No adapter is named {name!r}. Nearest: {', '.join(near[:8])}.")
    return adapters.names.index(name)


def _adapter_count(params: Any) -> int:
    counts = [v.scale.shape[-1] for v in trees.flatten(params).values() if _is_mixed(v)]
    if not counts:
        raise ValueError("index: the parameters hold no MixedLoRA leaf. See stack_adapters.")
    return counts[0]


def _is_mixed(value: Any) -> bool:
    return isinstance(value, MixedLoRA)


def _map_mixed(function: Any, params: Any) -> Any:
    return trees.map_with_path(lambda _, v: function(v) if _is_mixed(v) else v, params)


def _stacked(leaves: list[LoRA]) -> MixedLoRA:
    """One parameter's LoRA leaves as one, the adapters' axis after the stack axes."""
    first = leaves[0]
    depth, rows = len(first.stack_shape), max(leaf.a.shape[-2] for leaf in leaves)

    def padded(factor: Array) -> Array:
        missing = rows - factor.shape[-2]
        return jnp.pad(factor, ((0, 0),) * depth + ((0, missing), (0, 0)))

    def together(fields: list[Array]) -> Array:
        return jnp.stack(fields, axis=depth)

    drops = any(leaf.dropout is not None for leaf in leaves)
    none = jnp.zeros(first.stack_shape, jnp.float32)
    rates = [none if leaf.dropout is None else leaf.dropout for leaf in leaves]
    return MixedLoRA(
        base=first.base,
        a=together([padded(leaf.a) for leaf in leaves]),
        b=together([padded(leaf.b) for leaf in leaves]),
        scale=together([leaf.scale for leaf in leaves]),
        rank=together([leaf.rank for leaf in leaves]),
        dropout=together(rates) if drops else None,
        base_in_axes=first.base_in_axes,
    )


def _single(leaf: MixedLoRA, position: int) -> LoRA:
    def own(field: Array) -> Array:
        return field[(slice(None),) * len(leaf.stack_shape) + (position,)]

    return LoRA(
        base=leaf.base,
        a=own(leaf.a),
        b=own(leaf.b),
        scale=own(leaf.scale),
        rank=own(leaf.rank),
        dropout=None if leaf.dropout is None else own(leaf.dropout),
        key=leaf.key,
        base_in_axes=leaf.base_in_axes,
    )
