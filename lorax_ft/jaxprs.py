"""What this library needs to know of JAX's jaxprs, with all that differs between JAX versions kept
here."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.core
from jax._src import source_info_util
from jax.extend.core import Literal
from jax.interpreters import partial_eval

# One body, evaluated once with all operands in order: (name of the primitive, parameter with the
# jaxpr).
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
CHECKPOINT = ("remat2", "remat", "checkpoint")


@dataclasses.dataclass(frozen=True)
class Scan:
    """A `scan` equation taken apart; `body` maps (consts, carry, x slices) to (carry, y slices)."""

    consts: list[Any]
    carry: list[Any]
    xs: list[Any]
    body: Any
    length: int
    reverse: bool
    unroll: Any


def scan_parts(eqn: Any, operands: Sequence[Any]) -> Scan:
    params = eqn.params
    if "num_consts" in params:  # up to jax 0.10
        consts, carry = params["num_consts"], params["num_carry"]
    else:  # from jax 0.11: a tree of (consts, carry, xs) over the operands
        consts, carry, _ = (len(list(part.vals)) for part in params["ft_in"].unpack())
    return Scan(
        consts=list(operands[:consts]),
        carry=list(operands[consts : consts + carry]),
        xs=list(operands[consts + carry :]),
        body=params["jaxpr"],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )


def inner(closed_or_open: Any) -> tuple[Any, Sequence[Any]]:
    """(jaxpr, consts) of a closed or an open jaxpr."""
    if hasattr(closed_or_open, "consts"):
        return closed_or_open.jaxpr, closed_or_open.consts
    return closed_or_open, ()


def live(closed_or_open: Any) -> Any:
    """The open jaxpr without what no result needs, also in bodies of loops, as XLA leaves it out.

    So a frozen kernel's gradient, which the backward pass of its product states, is gone.
    """
    jaxpr, _ = inner(closed_or_open)
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Evaluates an equation unchanged."""
    results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


def evaluate(
    jaxpr: Any,
    consts: Sequence[Any],
    operands: Sequence[Any],
    rule: Callable[[Any, list[Any]], list[Any]],
):
    """Runs a jaxpr, asking `rule(eqn, operands)` for each equation's results; values may be of any
    type."""
    environment: dict[Any, Any] = dict(zip(jaxpr.constvars, consts))
    environment.update(zip(jaxpr.invars, operands, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else environment[atom]

    for eqn in jaxpr.eqns:
        with _source_of(eqn):
            results = rule(eqn, [read(atom) for atom in eqn.invars])
        environment.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def source_line(eqn: Any) -> str:
    """Where in the user's program an equation comes from: "model.py:12:8 (function)"."""
    return source_info_util.summarize(eqn.source_info)


def gather_mode(eqn: Any) -> str:
    """The `mode` of a gather as `jnp.take` and `.at[].get` spell it."""
    names = {"FILL_OR_DROP": "fill", "CLIP": "clip", "PROMISE_IN_BOUNDS": "promise_in_bounds"}
    return names.get(getattr(eqn.params["mode"], "name", ""), "fill")


def is_array(value: Any) -> bool:
    """Whether JAX would trace the value as an array of known shape; Python scalars and flags stay
    as they are."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def is_concrete(value: Any) -> bool:
    """Whether an array has values now: neither traced nor only a shape."""
    return is_array(value) and not isinstance(value, (jax.core.Tracer, jax.ShapeDtypeStruct))


@contextlib.contextmanager
def _source_of(eqn: Any) -> Iterator[None]:
    """Gives what is bound inside the equation's own name stack, source line and context."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with (
        source_info_util.user_context(eqn.source_info.traceback, name_stack=stack),
        eqn.ctx.manager,
    ):
        yield
