"""`lift`: runs any JAX function on parameters that hold leaves.

The function is traced to a jaxpr with every leaf shown as an array of its shape and dtype; the
jaxpr is then evaluated. An equation none of whose operands is a leaf is bound unchanged, so custom
derivatives, Pallas kernels and sharding pass through untouched. An equation that a leaf meets goes
to the rule for its primitive in `RULES`; without a rule it raises. A leaf is never silently made
dense.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from lorax_ft import jaxprs
from lorax_ft.layouts import Layout, size_of
from lorax_ft.leaves import Leaf, is_leaf
from lorax_ft.trees import path_name

_F = TypeVar("_F", bound=Callable[..., Any])


def lift(function: _F) -> _F:
    """The same function, with leaves allowed anywhere among its arguments.

    The result has the signature of `function`, and composes with `jit`, `grad`, `vmap`,
    `checkpoint`, `eval_shape` and meshes. Arrays among the arguments are traced; everything else
    (flags, strings, None) reaches `function` as it is. Raises TypeError where a leaf meets an
    operation that it has no rule for, naming the parameter, the operation and the line of the
    model.

    A `custom_vjp` or `custom_jvp` function of the model keeps its own derivative, except where it
    is handed a leaf itself: then its body is evaluated and differentiated, for its rule speaks of
    arrays.
    """

    @functools.wraps(function)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        operands, tree = jax.tree.flatten((args, kwargs), is_leaf=is_leaf)
        if not any(map(is_leaf, operands)):
            return function(*args, **kwargs)
        traced = [i for i, value in enumerate(operands) if jaxprs.is_array(value)]

        def call(*arrays: Any) -> Any:
            values = list(operands)
            for i, array in zip(traced, arrays, strict=True):
                values[i] = array
            args, kwargs = jax.tree.unflatten(tree, values)
            return function(*args, **kwargs)

        closed, shapes = jax.make_jaxpr(call, return_shape=True)(
            *[_shown(operands[i]) for i in traced]
        )
        paths = _paths((args, kwargs))
        values = [_view(operands[i], paths[i]) for i in traced]
        results = jaxprs.evaluate(closed.jaxpr, closed.consts, values, _rule)
        return jax.tree.unflatten(
            jax.tree.structure(shapes), [_returned(value) for value in results]
        )

    return lifted  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class View:
    """A leaf on its way through a model: which parameter it is and how its axes have been moved."""

    leaf: Leaf
    path: str
    layout: Layout


def _shown(value: Any) -> Any:
    return jax.ShapeDtypeStruct(value.shape, value.dtype) if is_leaf(value) else value


def _view(value: Any, path: str) -> Any:
    return View(value, path, Layout.of(value.shape)) if is_leaf(value) else value


def _returned(value: Any) -> Any:
    if not isinstance(value, View):
        return value
    if not value.layout.untouched:
        raise TypeError(
            f"lift: the function returns {value.path}, a {type(value.leaf).__name__} leaf, "
            "transposed or reshaped. Return the parameter as it is, or make it dense first."
        )
    return value.leaf


def _paths(arguments: Any) -> list[str]:
    """Names for error messages: the path within its argument, or which argument it is."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(arguments, is_leaf=is_leaf)]
    return [path_name(path[2:]) or f"argument {path_name(path[1:])}" for path in paths]


def _rule(eqn: Any, operands: list[Any]) -> list[Any]:
    if not any(isinstance(value, View) for value in operands):
        return jaxprs.bind(eqn, operands)
    name = eqn.primitive.name
    rule = RULES.get(name)
    result = rule(eqn, operands) if rule else None
    if result is None:
        raise TypeError(_no_rule(eqn, operands))
    return result


def _no_rule(eqn: Any, operands: list[Any]) -> str:
    views = [value for value in operands if isinstance(value, View)]
    what = ", ".join(
        f"{v.path!r} (a {type(v.leaf).__name__} leaf of shape {v.leaf.shape})" for v in views
    )
    return (
        f"lift: parameter {what} meets `{eqn.primitive.name}` at {jaxprs.source_line(eqn)}, and a "
        "leaf cannot take part in that as it stands. Leave this parameter out of the method's "
        "targets or of quantisation, or call `dense()` on it first."
    )


# --- Rules that only move axes --------------------------------------------------------------------


def _moved(view: View, layout: Layout | None) -> list[View] | None:
    return None if layout is None else [dataclasses.replace(view, layout=layout)]


def _convert(eqn: Any, operands: list[Any]) -> list[Any] | None:
    (view,) = operands
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return [
        view
        if dtype == view.leaf.dtype
        else dataclasses.replace(view, leaf=view.leaf.astype(dtype))
    ]


def _transpose(eqn: Any, operands: list[Any]) -> list[Any] | None:
    return _moved(operands[0], operands[0].layout.transpose(eqn.params["permutation"]))


def _reshape(eqn: Any, operands: list[Any]) -> list[Any] | None:
    return _moved(operands[0], operands[0].layout.reshape(eqn.params["new_sizes"]))


def _squeeze(eqn: Any, operands: list[Any]) -> list[Any] | None:
    return _moved(operands[0], operands[0].layout.squeeze(eqn.params["dimensions"]))


def _reduce_sum(eqn: Any, operands: list[Any]) -> list[Any] | None:
    """Einsum sums away an axis that nothing else has; of size one, that is a squeeze."""
    axes = eqn.params["axes"]
    if any(operands[0].layout.shape[axis] != 1 for axis in axes):
        return None
    return _moved(operands[0], operands[0].layout.squeeze(axes))


def _broadcast(eqn: Any, operands: list[Any]) -> list[Any] | None:
    view, params = operands[0], eqn.params
    return _moved(view, view.layout.expand(params["shape"], params["broadcast_dimensions"]))


def _same(eqn: Any, operands: list[Any]) -> list[Any] | None:
    return list(operands)


def _stop_gradient(eqn: Any, operands: list[Any]) -> list[Any] | None:
    (view,) = operands
    return [dataclasses.replace(view, leaf=jax.tree.map(lax.stop_gradient, view.leaf))]


# --- Slices of the stack axes ---------------------------------------------------------------------


def _slice(eqn: Any, operands: list[Any]) -> list[Any] | None:
    (view,) = operands
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(start)
    index = tuple(slice(*bounds) for bounds in zip(start, limit, strides))
    return _sliced(view, eqn, lambda field, depth: field[index[:depth]])


def _dynamic_slice(eqn: Any, operands: list[Any]) -> list[Any] | None:
    view, *starts = operands
    sizes = eqn.params["slice_sizes"]

    def cut(field: jax.Array, depth: int) -> jax.Array:
        for axis in range(depth):
            if sizes[axis] != view.leaf.shape[axis]:
                field = lax.dynamic_slice_in_dim(field, starts[axis], sizes[axis], axis)
        return field

    return _sliced(view, eqn, cut) if isinstance(view, View) else None


def _sliced(view: View, eqn: Any, cut: Callable[[jax.Array, int], jax.Array]) -> list[Any] | None:
    """Cuts each field along the stack axes, where the equation leaves the core whole."""
    depth = len(view.leaf.stack_shape)
    result = tuple(eqn.outvars[0].aval.shape)
    if not view.layout.untouched or result[depth:] != view.leaf.core_shape:
        return None
    leaf = jax.tree.map(lambda field: cut(field, depth), view.leaf)
    return [dataclasses.replace(view, leaf=leaf, layout=Layout.of(result))]


# --- Products and look-ups ------------------------------------------------------------------------


def _dot_general(eqn: Any, operands: list[Any]) -> list[Any] | None:
    """`leaf.linear` or `leaf.linear_transposed`, whichever axes are contracted, with axes put in
    order round it."""
    left, right = operands
    if isinstance(left, View) and isinstance(right, View):
        return None
    (contract_left, contract_right), (batch_left, batch_right) = eqn.params["dimension_numbers"]
    on_left = isinstance(left, View)
    view, x = (left, right) if on_left else (right, left)
    contract_view, contract_x = (
        (contract_left, contract_right) if on_left else (contract_right, contract_left)
    )
    batch_view, batch_x = (batch_left, batch_right) if on_left else (batch_right, batch_left)
    product = _Product.plan(view, contract_view, batch_view)
    if product is None:
        return None
    options = {k: eqn.params[k] for k in ("precision", "preferred_element_type")}
    free_x = [i for i in range(x.ndim) if i not in (*contract_x, *batch_x)]
    free_view = [i for i in range(len(view.layout.axes)) if i not in (*contract_view, *batch_view)]
    y, labels = product.run(x, contract_x, batch_x, free_x, options)
    batch = [("batch", i) for i in range(len(batch_x))]
    x_axes = [[("x", i)] for i in range(len(free_x))]
    view_axes = [list(view.layout.axes[i]) for i in free_view]
    order = [[b] for b in batch] + (view_axes + x_axes if on_left else x_axes + view_axes)
    y = y.transpose([labels.index(label) for axis in order for label in axis])
    return [y.reshape(eqn.outvars[0].aval.shape)]


@dataclasses.dataclass(frozen=True)
class _Product:
    """A product with a leaf, planned: which of its axes are contracted and which of its stack axes
    are batched."""

    view: View
    transposed: bool
    contracted: tuple[Any, ...]  # atoms in the order the model contracts them
    batch_of_stack: tuple[
        int | None, ...
    ]  # per stack axis: the position of its batch axis, if it is one

    @classmethod
    def plan(cls, view: View, contract: tuple[int, ...], batch: tuple[int, ...]) -> _Product | None:
        leaf, layout = view.leaf, view.layout
        depth, ndim = len(leaf.stack_shape), leaf.ndim
        atoms = tuple(atom for i in contract for atom in layout.axes[i])
        inputs = _atoms(layout, [ndim + a for a in leaf.in_axes])
        outputs = _atoms(layout, [ndim + a for a in leaf.out_axes])
        if sorted(atoms) not in (sorted(inputs), sorted(outputs)):
            return None
        batch_axes = [layout.axes[i] for i in batch]
        stack = [layout.origin[i] for i in range(depth)]
        if any(axis not in stack for axis in batch_axes):
            return None
        positions = tuple(batch_axes.index(axis) if axis in batch_axes else None for axis in stack)
        return cls(view, sorted(atoms) != sorted(inputs), atoms, positions)

    def run(self, x: Any, contract: Any, batch: Any, free: list[int], options: dict[str, Any]):
        """The product, and a label for each of its axes: ("batch", i), ("x", i) or an atom of the
        leaf."""
        leaf, layout = self.view.leaf, self.view.layout
        sources = leaf.out_axes if self.transposed else leaf.in_axes
        targets = leaf.in_axes if self.transposed else leaf.out_axes
        # x as [batch..., free..., inputs], its inputs in the leaf's own order
        x = x.transpose([*batch, *free, *contract])
        kept = x.shape[: len(batch) + len(free)]
        x = x.reshape(kept + tuple(size for _, size in self.contracted))
        wanted = _atoms(layout, [leaf.ndim + a for a in sources])
        tail = [len(kept) + self.contracted.index(atom) for atom in wanted]
        x = x.transpose([*range(len(kept)), *tail]).reshape(*kept, size_of(wanted))
        y, stack_labels = self._mapped(x, options)
        results = _atoms(layout, [leaf.ndim + a for a in targets])
        y = y.reshape(y.shape[:-1] + tuple(size for _, size in results))
        return y, [*stack_labels, *[("x", i) for i in range(len(free))], *results]

    def _mapped(self, x: Any, options: dict[str, Any]) -> tuple[Any, list[Any]]:
        """The leaf's own product under one `vmap` for each stack axis, batched or not."""
        leaf, layout = self.view.leaf, self.view.layout
        method = "linear_transposed" if self.transposed else "linear"

        def product(leaf: Leaf, x: Any) -> Any:
            return getattr(leaf, method)(x, **options)

        batched = [p for p in self.batch_of_stack if p is not None]
        x = x.transpose([*batched, *range(len(batched), x.ndim)])
        for position in reversed(self.batch_of_stack):
            product = jax.vmap(product, in_axes=(0, None if position is None else 0))
        labels: list[Any] = []
        for axis, position in enumerate(self.batch_of_stack):
            # a stack axis of size one has no atom, and so no label: its axis is folded away below
            labels += [("batch", position)] if position is not None else list(layout.origin[axis])
        y = product(leaf, x)
        sizes = [
            size
            for size, p in zip(leaf.stack_shape, self.batch_of_stack)
            if p is not None or size != 1
        ]
        return y.reshape(*sizes, *y.shape[len(leaf.stack_shape) :]), labels


def _atoms(layout: Layout, axes: list[int]) -> tuple[Any, ...]:
    return tuple(atom for i in axes for atom in layout.origin[i])


def _gather(eqn: Any, operands: list[Any]) -> list[Any] | None:
    """An embedding look-up: whole rows of an untouched table, picked along its first axis."""
    view, indices = operands
    if not isinstance(view, View) or not view.layout.untouched or view.leaf.stack_shape:
        return None
    leaf, numbers = view.leaf, eqn.params["dimension_numbers"]
    if (
        leaf.in_axes != (-leaf.ndim,)
        or numbers.start_index_map != (0,)
        or numbers.collapsed_slice_dims != (0,)
    ):
        return None
    if tuple(eqn.params["slice_sizes"]) != (1, *leaf.core_shape[1:]) or getattr(
        numbers, "operand_batching_dims", ()
    ):
        return None
    ids = indices[..., 0]
    rows = leaf.take(ids, mode=jaxprs.gather_mode(eqn)).reshape(ids.shape + leaf.core_shape[1:])
    row_axes = tuple(numbers.offset_dims)
    return [jnp.moveaxis(rows, range(ids.ndim, rows.ndim), row_axes)]


def _add(eqn: Any, operands: list[Any]) -> list[Any] | None:
    """`leaf.add_to` of a bias without stack axes: the last axes of what it is added to."""
    left, right = operands
    view, y = (left, right) if isinstance(left, View) else (right, left)
    if isinstance(y, View) or view.leaf.stack_shape or not view.leaf.is_bias:
        return None
    depth = len(view.layout.axes) - len(view.layout.origin)
    if any(view.layout.axes[:depth]) or view.layout.axes[depth:] != view.layout.origin:
        return None
    shape = tuple(eqn.outvars[0].aval.shape)
    if y.shape != shape:
        return None
    rows = y.reshape(*shape[:depth], view.leaf.size)
    return [view.leaf.add_to(rows).reshape(shape)]


# --- Equations that hold jaxprs -------------------------------------------------------------------


def _call(eqn: Any, operands: list[Any]) -> list[Any] | None:
    jaxpr, consts = jaxprs.inner(eqn.params[jaxprs.CALLS[eqn.primitive.name]])
    return jaxprs.evaluate(jaxpr, consts, operands, _rule)


def _checkpoint(eqn: Any, operands: list[Any]) -> list[Any] | None:
    jaxpr, consts = jaxprs.inner(eqn.params["jaxpr"])
    bare, restore = _bare(operands)

    @functools.partial(
        jax.checkpoint, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
    )
    def body(bare: list[Any]) -> list[Any]:
        return _only_arrays(eqn, jaxprs.evaluate(jaxpr, consts, restore(bare), _rule))

    return body(bare)


def _scan(eqn: Any, operands: list[Any]) -> list[Any] | None:
    """Leaves among the constants are closed over; those among the slices lose their first stack
    axis."""
    scan = jaxprs.scan_parts(eqn, operands)
    if any(isinstance(value, View) for value in scan.carry):
        return None
    layouts = [value.layout.drop_front() if isinstance(value, View) else None for value in scan.xs]
    for value, layout in zip(scan.xs, layouts):
        if isinstance(value, View) and (layout is None or not value.leaf.stack_shape):
            return None
    jaxpr, consts = jaxprs.inner(scan.body)

    def body(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        xs = [
            View(piece, value.path, layout) if layout is not None else piece
            for value, piece, layout in zip(scan.xs, slices, layouts)
        ]
        results = _only_arrays(
            eqn, jaxprs.evaluate(jaxpr, consts, [*scan.consts, *carry, *xs], _rule)
        )
        return results[: len(carry)], results[len(carry) :]

    xs = [value.leaf if isinstance(value, View) else value for value in scan.xs]
    carry, ys = lax.scan(body, scan.carry, xs, scan.length, scan.reverse, scan.unroll)
    return [*carry, *ys]


def _while(eqn: Any, operands: list[Any]) -> list[Any] | None:
    condition, body = jaxprs.inner(eqn.params["cond_jaxpr"]), jaxprs.inner(eqn.params["body_jaxpr"])
    cut = eqn.params["cond_nconsts"], eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
    cond_consts, body_consts, carry = (
        operands[: cut[0]],
        operands[cut[0] : cut[1]],
        operands[cut[1] :],
    )
    if any(isinstance(value, View) for value in carry):
        return None

    def run(closed: Any, consts: list[Any], carry: list[Any]) -> list[Any]:
        return _only_arrays(eqn, _evaluate(closed, [*consts, *carry]))

    return lax.while_loop(
        lambda carry: run(condition, cond_consts, carry)[0],
        lambda carry: run(body, body_consts, carry),
        carry,
    )


def _cond(eqn: Any, operands: list[Any]) -> list[Any] | None:
    index, *rest = operands
    branches = [
        functools.partial(
            lambda closed: _only_arrays(eqn, _evaluate(closed, rest)),
            jaxprs.inner(branch),
        )
        for branch in eqn.params["branches"]
    ]
    return lax.switch(index.astype(jnp.int32), branches)


def _bare(operands: list[Any]) -> tuple[list[Any], Callable[[list[Any]], list[Any]]]:
    """Operands with leaves in place of views, which JAX can flatten, and the way back."""

    def restore(bare: list[Any]) -> list[Any]:
        return [
            dataclasses.replace(value, leaf=plain) if isinstance(value, View) else plain
            for value, plain in zip(operands, bare, strict=True)
        ]

    return [value.leaf if isinstance(value, View) else value for value in operands], restore


def _evaluate(closed: tuple[Any, Any], operands: list[Any]) -> list[Any]:
    jaxpr, consts = closed
    return jaxprs.evaluate(jaxpr, consts, operands, _rule)


def _only_arrays(eqn: Any, results: list[Any]) -> list[Any]:
    if any(isinstance(value, View) for value in results):
        raise TypeError(_no_rule(eqn, results))
    return results


RULES: dict[str, Callable[[Any, list[Any]], list[Any] | None]] = {
    "convert_element_type": _convert,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "reduce_sum": _reduce_sum,
    "broadcast_in_dim": _broadcast,
    "copy": _same,
    "copy_p": _same,
    "optimization_barrier": _same,
    "sharding_constraint": _same,
    "stop_gradient": _stop_gradient,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dot_general": _dot_general,
    "gather": _gather,
    "add": _add,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    **dict.fromkeys(jaxprs.CHECKPOINT, _checkpoint),
    **dict.fromkeys(jaxprs.CALLS, _call),
}
"""The rule for each primitive: (equation, operands) to results, or None where it does not apply."""
