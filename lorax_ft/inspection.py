"""`inspect`: how a model uses each of its parameters, found by reading the model's jaxpr.

It needs no table of model names, so "all linear layers" and "every bias" work on a model that no
one here has seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax

from lorax_ft import jaxprs
from lorax_ft.layouts import Layout
from lorax_ft.leaves import is_leaf
from lorax_ft.trees import path_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use:
    """What a model does with one parameter."""

    kind: str
    """"kernel" (multiplied with), "embedding" (looked up in), "bias" (added), "scale" (multiplied
    element by element), "other" or "unused"."""

    in_axes: tuple[int, ...] = ()
    """Of a kernel or embedding: the axes that a product contracts, counted from the end."""

    stack: int = 0
    """How many leading axes are stacked layers or experts."""

    kernel: str | None = None
    """Of a bias: the path of the kernel to whose product it is added."""

    is_head: bool = False
    """Whether everything the model returns passes through this kernel last."""

    tied: bool = False
    """Of an embedding: whether it is multiplied with as well, as a tied output head is."""

    primitives: tuple[str, ...] = ()
    """The operations that the parameter meets, after those that only move or cast it."""


def inspect(apply: Callable[..., Any], params: Any, *inputs: Any, **options: Any) -> dict[str, Use]:
    """Traces `apply(params, *inputs, **options)` and says of every parameter, by path, how it is
    used.

    Arrays may be `ShapeDtypeStruct`s: nothing is computed. Leaves are seen as the arrays that they
    stand for.
    """
    parameters, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for _, value in parameters]

    def call(shapes: list[Any], inputs: Any) -> Any:
        return apply(jax.tree.unflatten(tree, shapes), *inputs, **options)

    closed = jax.make_jaxpr(call)(shapes, inputs)
    reader = _Reader({path_name(path): [] for path, _ in parameters})
    traces = [_Parameter(path_name(p), Layout.of(v.shape), 0) for p, v in parameters]
    others = [_Activation()] * (len(closed.jaxpr.invars) - len(traces))
    results = reader.read(closed.jaxpr, closed.consts, [*traces, *others])
    return reader.uses(results)


# --- What flows through the jaxpr -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """A parameter, transposed, reshaped or cast; `layout` is None once its axes cannot be
    followed."""

    path: str
    layout: Layout | None
    stack: int


@dataclasses.dataclass(frozen=True)
class _Activation:
    """Anything computed: which kernels it comes from last, and of which one it is the bare
    product."""

    last: frozenset[str] = frozenset()
    product: str | None = None


@dataclasses.dataclass(frozen=True)
class _Meeting:
    """A parameter meeting an operation."""

    primitive: str
    kind: str
    in_axes: tuple[int, ...] = ()
    stack: int = 0
    kernel: str | None = None


MOVES: dict[str, Callable[[Layout, Any], Layout | None]] = {
    "transpose": lambda layout, params: layout.transpose(params["permutation"]),
    "reshape": lambda layout, params: layout.reshape(params["new_sizes"]),
    "squeeze": lambda layout, params: layout.squeeze(params["dimensions"]),
    "broadcast_in_dim": lambda layout, p: layout.expand(p["shape"], p["broadcast_dimensions"]),
}
SAME = {
    "convert_element_type",
    "copy",
    "copy_p",
    "optimization_barrier",
    "sharding_constraint",
    "stop_gradient",
}
SLICES = {"slice", "dynamic_slice"}
SUMS = {"add", "sub", "add_any"}


class _Reader:
    """Walks a jaxpr and notes in `meetings` what each parameter meets."""

    def __init__(self, meetings: dict[str, list[_Meeting]]):
        self.meetings = meetings

    def read(self, jaxpr: Any, consts: Any, values: list[Any]) -> list[Any]:
        return jaxprs.evaluate(jaxpr, [_Activation() for _ in consts], values, self.rule)

    def rule(self, eqn: Any, values: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        values = [v if isinstance(v, (_Parameter, _Activation)) else None for v in values]
        if name in jaxprs.CALLS:
            return self.read(*jaxprs.inner(eqn.params[jaxprs.CALLS[name]]), values)
        if name in jaxprs.CHECKPOINT:
            return self.read(*jaxprs.inner(eqn.params["jaxpr"]), values)
        if name in HIGHER_ORDER:
            return HIGHER_ORDER[name](self, eqn, values)
        parameters = [v for v in values if isinstance(v, _Parameter)]
        if not parameters:
            return self.computed(eqn, values)
        if (moved := _moved(eqn, values, parameters)) is not None:
            return moved
        if name == "dot_general":
            return self.dot_general(eqn, values)
        for parameter in parameters:
            self.note(parameter, _meeting(eqn, values, parameter))
        return self.computed(eqn, values)

    def computed(self, eqn: Any, values: list[Any]) -> list[Any]:
        """The results of an operation: they come from whatever its operands come from."""
        result = _Activation(_union(values))
        if eqn.primitive.name in SAME | set(MOVES):  # still the bare product of a kernel
            result = next((v for v in values if isinstance(v, _Activation)), result)
        return [result for _ in eqn.outvars]

    def dot_general(self, eqn: Any, values: list[Any]) -> list[Any]:
        contract, batch = eqn.params["dimension_numbers"]
        paths = []
        for value, axes, batch_axes in zip(values, contract, batch):
            if isinstance(value, _Parameter):
                self.note(value, _product(value, axes, batch_axes))
                paths.append(value.path)
        return [_Activation(frozenset(paths), paths[0] if len(paths) == 1 else None)]

    def note(self, parameter: _Parameter, meeting: _Meeting) -> None:
        meetings = self.meetings[parameter.path]
        if meeting not in meetings:
            meetings.append(meeting)

    def uses(self, results: list[Any]) -> dict[str, Use]:
        last = _union(results)
        uses = {path: _use(meetings) for path, meetings in self.meetings.items()}
        if len(last) == 1 and uses[head := next(iter(last))].kind == "kernel":
            uses[head] = dataclasses.replace(uses[head], is_head=True)
        return uses


def _union(values: Iterable[Any]) -> frozenset[str]:
    return frozenset().union(*(v.last for v in values if isinstance(v, _Activation)))


def _moved(eqn: Any, values: list[Any], parameters: list[_Parameter]) -> list[Any] | None:
    """The parameter after an operation that only moves, casts or shifts it by a constant."""
    name, first = eqn.primitive.name, parameters[0]
    if name in SAME and len(values) == len(parameters):
        return list(values)
    if name in MOVES and values[0] is first:
        layout = first.layout and MOVES[name](first.layout, eqn.params)
        return [dataclasses.replace(first, layout=layout)]
    if name in SLICES and values[0] is first:
        return [_sliced(eqn, first)]
    if name in SUMS | {"mul"} and len(parameters) == 1 and None in values:  # such as 1 + scale
        return [dataclasses.replace(first, layout=first.layout)]
    return None


def _sliced(eqn: Any, parameter: _Parameter) -> _Parameter:
    """A slice of leading axes: those that became shorter are stacked layers."""
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    shorter = [i for i, (b, a) in enumerate(zip(before, after)) if b != a]
    if (
        parameter.layout is None
        or not parameter.layout.untouched
        or shorter != [*range(len(shorter))]
    ):
        return dataclasses.replace(parameter, layout=None)
    depth = max(parameter.stack, len(shorter))
    return _Parameter(parameter.path, Layout.of(after), depth)


def _product(parameter: _Parameter, contracted: Any, batched: Any) -> _Meeting:
    """How a product contracts a parameter; batched leading axes are stacked experts."""
    layout = parameter.layout
    inputs = layout.origin_of(contracted) if layout else None
    stacked = layout.origin_of(batched) if layout else None
    if layout is None or inputs is None or stacked is None or stacked != tuple(range(len(stacked))):
        return _Meeting("dot_general", "other")
    ndim = len(layout.origin)
    # a contracted axis of size one has no atoms; of a matrix it is the one that is not an output
    axes = inputs or tuple(
        i for i, axis in enumerate(layout.origin) if not axis and i >= len(stacked)
    )
    in_axes = tuple(i - ndim for i in axes)
    return _Meeting("dot_general", "kernel", in_axes, max(parameter.stack, len(stacked)))


def _meeting(eqn: Any, values: list[Any], parameter: _Parameter) -> _Meeting:
    name = eqn.primitive.name
    if name == "gather" and values[0] is parameter:
        numbers = eqn.params["dimension_numbers"]
        if numbers.start_index_map == (0,) == numbers.collapsed_slice_dims:
            return _Meeting(name, "embedding", (-len(eqn.invars[0].aval.shape),), parameter.stack)
    if name in SUMS:
        products = [v.product for v in values if isinstance(v, _Activation)]
        return _Meeting(name, "bias", (), parameter.stack, products[0] if products else None)
    return _Meeting(name, "scale" if name == "mul" else "other", (), parameter.stack)


def _use(meetings: list[_Meeting]) -> Use:
    if not meetings:
        return Use(kind="unused")
    kinds = {m.kind for m in meetings}
    products = [m for m in meetings if m.kind == "kernel"]
    lookups = [m for m in meetings if m.kind == "embedding"]
    if lookups:
        first, kind = lookups[0], "embedding"
    elif products and len({m.in_axes for m in products}) == 1:
        first, kind = products[0], "kernel"
    else:
        first, kind = meetings[0], meetings[0].kind if len(kinds) == 1 and not products else "other"
    return Use(
        kind=kind,
        in_axes=first.in_axes,
        stack=max(m.stack for m in meetings),
        kernel=first.kernel,
        tied=bool(lookups and products),
        primitives=tuple(dict.fromkeys(m.primitive for m in meetings)),
    )


# --- Equations that hold jaxprs -------------------------------------------------------------------


def _scan(reader: _Reader, eqn: Any, values: list[Any]) -> list[Any]:
    scan = jaxprs.scan_parts(eqn, values)
    xs = [_slice_of(value) for value in scan.xs]
    body = jaxprs.inner(scan.body)
    carry = [v if isinstance(v, _Activation) else _Activation() for v in scan.carry]
    while True:  # what the carry comes from grows until it settles
        results = reader.read(*body, [*scan.consts, *carry, *xs])
        after = [_Activation(_union([old, new])) for old, new in zip(carry, results)]
        if [a.last for a in after] == [c.last for c in carry]:
            return [_Activation(_union([new])) for new in results[: len(carry)]] + [
                _Activation(_union([y])) for y in results[len(carry) :]
            ]
        carry = after


def _slice_of(value: Any) -> Any:
    if not isinstance(value, _Parameter):
        return _Activation(value.last) if value else None
    layout = value.layout and value.layout.drop_front()
    return _Parameter(value.path, layout, value.stack + 1)


def _while(reader: _Reader, eqn: Any, values: list[Any]) -> list[Any]:
    conds, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = [v if isinstance(v, _Activation) else _Activation() for v in values[conds + consts :]]
    reader.read(*jaxprs.inner(eqn.params["cond_jaxpr"]), [*values[:conds], *carry])
    body = jaxprs.inner(eqn.params["body_jaxpr"])
    while True:
        results = reader.read(*body, [*values[conds : conds + consts], *carry])
        after = [_Activation(_union([old, new])) for old, new in zip(carry, results)]
        if after == carry:
            return after
        carry = after


def _cond(reader: _Reader, eqn: Any, values: list[Any]) -> list[Any]:
    branches = [reader.read(*jaxprs.inner(b), values[1:]) for b in eqn.params["branches"]]
    return [_Activation(_union(results)) for results in zip(*branches)]


HIGHER_ORDER = {"scan": _scan, "while": _while, "cond": _cond}
