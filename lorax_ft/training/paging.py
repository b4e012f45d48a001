"""Paged optimizers: states live in the host's memory and visit the device a page at a time.

A page is one layer of everything that is stacked at `layers/...`, or some rows of another large
array. Within the jitted step a loop moves each page in, updates it and writes it back in place, so
that the device never holds more than one page of states, and what it has for a longer batch is what
the states would have taken. (With `scan` or a Python loop instead, XLA brings all pages in at
once.) Of states in eight bits the codes are paged; absmax, a 64th of them, stays on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lorax_ft import trees
from lorax_ft.axes import even
from lorax_ft.training import clipping, host_memory
from lorax_ft.training.blockwise import BLOCK, GROUP, LANES, is_blocks, stored_axes
from lorax_ft.training.sharding import replicate
from lorax_ft.training.states import is_stacked, map_states

Array = jax.Array
PyTree = Any

SMALLEST = 100_000  # numbers of a matrix whose states are paged; bitsandbytes draws the same line
PAGE = 2**22  # numbers of a page, where it is not a layer
HOST = "pinned_host"


class PagedOptimizer(NamedTuple):
    """An optimizer that changes parameters and states in place, for `make_train_step`; see `page`.

    `init` is an optax transformation's. `update` raises: updates of all parameters would be a
    second copy of them.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[..., Any]
    each: optax.GradientTransformation  # all but clipping
    clips: bool
    rowwise: bool
    smallest: int
    split: frozenset[str] = frozenset()  # arrays whose rows lie on several devices, see `lying_as`


class Pages(NamedTuple):
    """Arrays that are turned together, so many rows of their first axis at a time."""

    paths: frozenset[str]
    rows: int  # of a page
    size: int  # of the axis


def page(
    each: Sequence[optax.GradientTransformation],
    *,
    rowwise: bool,
    clip_norm: float | None = None,
    smallest: int | None = None,
) -> PagedOptimizer:
    """`optax.chain(clip_by_norm(clip_norm), *each)`, paged: the same numbers and structure.

    They are the same to the bit for the optimizers of `build_optimizer`, on a mesh too; but of
    eight-bit states on a mesh a code may come out as its neighbour.

    What optax keeps in trees of the parameters' structure is paged, for matrices of at least
    `smallest` numbers in all layers, by default 100,000; where it lies is `start_optimizer`'s part.

    `rowwise` says that `each` treats every row of an array by itself, as the scaling of Adam, Lion,
    SGD and RMSProp, decay and learning rates do, but no norm of an array: then the states come page
    by page. Otherwise, for any other transformations of optax, they come all at once, and are on
    the device during the update but not during the forward and backward pass. `init` raises
    ValueError where `rowwise` cannot hold, since states are of other shapes than the parameters.

    >>> tx = page([optax.scale_by_rms(), optax.scale(-1e-3)], rowwise=True, clip_norm=1.0)
    >>> state = start_optimizer(tx, {"kernel": jnp.ones((512, 256))})
    >>> state[1].nu["kernel"].sharding.memory_kind
    'pinned_host'
    """
    clip = [] if clip_norm is None else [clipping.clip_by_norm(clip_norm)]
    chained = optax.chain(*each)

    def init(params):
        state: Any = chained.init(params)
        if rowwise:
            _check_rowwise(params, state)
        return (*(part.init(params) for part in clip), *state)

    def update(updates, state, params=None):
        del updates, state, params
        raise TypeError(
            "A paged optimizer changes parameters and states page by page and has no updates to "
            "return. Use it with make_train_step, or set OptimizerConfig.paged to False."
        )

    smallest = SMALLEST if smallest is None else smallest
    return PagedOptimizer(init, update, chained, bool(clip), rowwise, smallest)


def start_optimizer(tx: Any, train: PyTree, mesh: Mesh | None = None) -> PyTree:
    """The state of an optimizer before its first step, each array where it belongs.

    The states of a paged optimizer lie on the mesh as their parameters do, and are made in the
    host's memory; raises MemoryError, before anything is allocated, where it has no room for them.
    """
    if not isinstance(tx, PagedOptimizer):
        state = tx.init(train)
        return state if mesh is None else replicate(state, mesh)
    shapes = jax.eval_shape(tx.init, train)
    shardings = state_shardings(tx, shapes, train, mesh or one_device_mesh(train))
    needed = host_memory.needed(shapes, shardings, HOST)
    host_memory.check_room(needed, "The paged states of the optimizer")
    return jax.jit(tx.init, out_shardings=shardings)(train)


def state_shardings(tx: Any, state: PyTree, train: PyTree, mesh: Mesh) -> PyTree:
    """The `NamedSharding` of every array of an optimizer's state; those that are paged on the host.

    A state lies on the mesh as its parameter does, whose sharding `train` must carry; absmax of
    eight-bit states as the axes in front of its blocks do.
    """
    parameters = trees.flatten_arrays(train)
    specs = {path: _spec(array, mesh) for path, array in parameters.items()}

    def place(field: str, path: str, value: Any) -> Any:
        del field
        shape, spec = parameters[path].shape, specs[path]
        kind = HOST if _is_paged(tx, path, shape) else None

        def lies(x: Any, spec: PartitionSpec, kind: str | None) -> NamedSharding:
            return NamedSharding(mesh, even(spec, x.shape, mesh), memory_kind=kind)

        if not is_blocks(value):
            return lies(value, spec, kind)
        of_codes = PartitionSpec(*stored_axes(spec, shape, is_stacked(path)))
        return value._replace(
            codes=lies(value.codes, of_codes, kind), absmax=lies(value.absmax, spec, None)
        )

    placed = map_states(place, train, state, is_leaf=is_blocks)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: x if isinstance(x, NamedSharding) else everywhere, placed)


def paged_arrays(tx: Any, state: PyTree, train: PyTree) -> list[Any]:
    """The arrays of an optimizer's state that are paged, none for one that is not."""
    parameters, found = trees.flatten_arrays(train), []

    def look(field: str, path: str, value: Any) -> Any:
        del field
        if _is_paged(tx, path, parameters[path].shape):
            found.append(value.codes if is_blocks(value) else value)
        return value

    map_states(look, train, state, is_leaf=is_blocks)
    return found


def lying_as(tx: PagedOptimizer, shardings: PyTree) -> PagedOptimizer:
    """The optimizer for parameters of these shardings: what is split by rows has no pages of it."""
    found = trees.flatten_arrays(shardings)
    return tx._replace(split=frozenset(path for path, s in found.items() if is_split(s)))


def is_split(sharding: Any) -> bool:
    """Whether the rows of an array lie on several devices, so that some of them are not on all."""
    if not isinstance(sharding, NamedSharding) or not len(sharding.spec):
        return False
    names = sharding.spec[0]
    names = (names,) if isinstance(names, str) else names or ()
    return math.prod(sharding.mesh.shape[name] for name in names) > 1


def one_device_mesh(tree: PyTree) -> Mesh:
    """A mesh of the one device that a tree's arrays are on: what names a memory needs a mesh."""
    device = next(iter(jax.tree.leaves(tree)[0].sharding.device_set))
    return Mesh(np.array([device]), ("device",), axis_types=(AxisType.Auto,))


def pages(params: PyTree, tx: PagedOptimizer) -> list[Pages]:
    """What of the parameters is turned page by page. `params` may be `ShapeDtypeStruct`s."""
    if not tx.rowwise:
        return []
    layers: dict[int, set[str]] = {}
    found = []
    for path, array in trees.flatten_arrays(params).items():
        if path in tx.split or not _is_paged(tx, path, array.shape):
            continue
        if is_stacked(path):
            layers.setdefault(array.shape[0], set()).add(path)
        elif array.ndim > 1 and array.shape[-1] % BLOCK == 0:  # rows are whole blocks
            rows = page_rows(array.shape)
            if rows < array.shape[0]:
                found.append(Pages(frozenset([path]), rows, array.shape[0]))
    return [Pages(frozenset(p), 1, size) for size, p in layers.items()] + found


def page_rows(shape: tuple[int, ...]) -> int:
    """How many rows of an array of this shape make a page, where it is not a layer.

    They divide the array: a last page of another size would be compiled, and rounded, otherwise.
    Those of a matrix are eights of rows, at whose edges alone a TPU can part it. All rows where no
    number near `PAGE` is such.
    """
    step = GROUP if len(shape) == 2 else 1
    most = min(shape[0], max(1, PAGE // math.prod(shape[1:])))
    counts = range(most - most % step, most // 8, -step)
    return next((r for r in counts if shape[0] % r == 0), shape[0])


def update_where(
    tx: optax.GradientTransformation | PagedOptimizer,
    gradient: PyTree,
    scale: Array,
    state: PyTree,
    params: PyTree,
    take: Array,
) -> tuple[PyTree, PyTree]:
    """(params, state) after an update by `gradient * scale` where `take` holds, else as they were.

    `gradient` may be in float32 whatever the parameters are in.
    """
    if isinstance(tx, PagedOptimizer):
        return _update_pages(tx, gradient, scale, state, params, take)
    return _update(tx, clipping.scaled(gradient, scale, params), state, params, take)


def _update(
    tx: optax.GradientTransformation, gradient: PyTree, state: PyTree, params: PyTree, take: Array
) -> tuple[PyTree, PyTree]:
    updates, new_state = tx.update(gradient, state, params)
    new = optax.apply_updates(params, updates), new_state
    return jax.tree.map(lambda a, b: jnp.where(take, a, b), new, (params, state))


def _update_pages(
    tx: PagedOptimizer, gradient: PyTree, scale: Array, state: PyTree, params: PyTree, take: Array
) -> tuple[PyTree, PyTree]:
    """`update_where`: page by page, and all that has no pages at once.

    Scaling and clipping are part of a page's work, as in an unpaged step they are of an array's:
    XLA rounds a product otherwise that it can join to the sum that it goes into.
    """
    factors, clip = [scale], ()
    if tx.clips:
        clip, state = state[:1], state[1:]
        factors.append(clipping.factor(clipping.scaled(gradient, scale, params), clip[0]))

    def update(gradient, state, params):
        for factor in factors:
            gradient = clipping.scaled(gradient, factor, params)
        return _update(tx.each, gradient, state, params, take)

    groups = pages(params, tx)
    paged = frozenset().union(*(group.paths for group in groups))
    rest = frozenset(trees.flatten_arrays(params)) - paged

    def part(paths: frozenset[str]) -> tuple[PyTree, PyTree, PyTree]:
        keep = lambda path, x: x if trees.path_name(path) in paths else None
        return (
            jax.tree_util.tree_map_with_path(keep, gradient),
            map_states(lambda _, p, x: x if p in paths else None, params, state, is_leaf=is_blocks),
            jax.tree_util.tree_map_with_path(keep, params),
        )

    turned = [_turn(update, group, *part(group.paths)) for group in groups]
    turned.append(_turn_at_once(update, *part(rest)))  # last: its counts are the new ones
    return (
        _merged(params, [params_of for params_of, _ in turned]),
        (*clip, *_merged(state, [state_of for _, state_of in turned])),
    )


def _turn(
    update: Callable[..., tuple[PyTree, PyTree]],
    group: Pages,
    gradient: PyTree,
    state: PyTree,
    params: PyTree,
) -> tuple[PyTree, PyTree]:
    """(params, state) of a group after the update; counts and numbers stay as they were."""
    count = group.size // group.rows

    def body(page: Array, arrays: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        def fetch(x: Array) -> Array:
            rows = x.shape[0] // count  # codes of a matrix have an eighth as many
            return _to_device(jax.lax.dynamic_slice_in_dim(x, page * rows, rows, axis=0))

        def put(x: Array, new: Array) -> Array:
            first, new = page * new.shape[0], _to_memory_of(x, new)
            return jax.lax.dynamic_update_slice_in_dim(x, new, first, axis=0)

        params, state = arrays
        new_params, new_state = update(
            jax.tree.map(fetch, gradient),
            _map_arrays(fetch, params, state),
            jax.tree.map(fetch, params),
        )
        return jax.tree.map(put, params, new_params), _map_arrays(put, params, state, new_state)

    return jax.lax.fori_loop(0, count, body, (params, state))


def _turn_at_once(
    update: Callable[..., tuple[PyTree, PyTree]], gradient: PyTree, state: PyTree, params: PyTree
) -> tuple[PyTree, PyTree]:
    """(params, state) after the update, with what else the optimizer remembers."""
    new_params, new_state = update(gradient, _map_arrays(_to_device, params, state), params)
    put = lambda new, x: _to_memory_of(x, new)
    return new_params, _map_arrays(put, params, new_state, state)


def _is_paged(tx: Any, path: str, shape: tuple[int, ...]) -> bool:
    """Whether the states of a parameter are in the host's memory.

    Not those of vectors, nor of layers that are no whole groups of rows, such as a factor of rank
    one: a TPU cannot move a layer of them by itself, and next to the others they are small.
    """
    stacked = is_stacked(path)
    layer = shape[stacked:]
    return (
        isinstance(tx, PagedOptimizer)
        and math.prod(shape) >= tx.smallest
        and len(layer) > 1
        and not (stacked and math.prod(layer) % (GROUP * LANES))
    )


def _map_arrays(
    function: Callable[..., Any], params: PyTree, state: PyTree, *others: PyTree
) -> PyTree:
    """`map_states` for a function of arrays, of which a state in eight bits has two."""
    return map_states(
        lambda field, path, *values: jax.tree.map(function, *values),
        params,
        state,
        *others,
        is_leaf=is_blocks,
    )


def _to_device(x: Array) -> Array:
    return _moved(x, jax.memory.Space.Device)


def _to_memory_of(x: Array, new: Array) -> Array:
    return _moved(new, jax.typeof(x).memory_space)


def _moved(x: Array, space: Any) -> Array:
    return x if jax.typeof(x).memory_space == space else jax.device_put(x, space)


def _spec(array: Any, mesh: Mesh) -> PartitionSpec:
    """How a parameter lies on the mesh; whole on each device where nothing is said."""
    sharding = getattr(array, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh == mesh:
        return sharding.spec
    return PartitionSpec()


def _check_rowwise(params: PyTree, state: PyTree) -> None:
    """Raises where a state has arrays that are of no parameter's, and so have no rows to page."""
    others = map_states(lambda *_: None, params, state, is_leaf=is_blocks)
    found = {path: list(x.shape) for path, x in trees.flatten_arrays(others).items() if x.ndim}
    if found:
        raise ValueError(
            "page(..., rowwise=True): the optimizer keeps arrays that are not of the parameters' "
            f"shapes, such as {dict(list(found.items())[:3])}. Set rowwise=False."
        )


def _merged(like: PyTree, parts: Sequence[PyTree]) -> PyTree:
    """The tree of `like` with the arrays of the parts, a later part's where several have one."""
    arrays: dict[str, Array] = {}
    for part in parts:
        arrays |= trees.flatten_arrays(part)
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[trees.path_name(path)], like)
