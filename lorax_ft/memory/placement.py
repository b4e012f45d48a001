"""Placement: how a run's trees will lie on its devices, as shapes, before any of them is there."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from lorax_ft import training, trees
from lorax_ft.adapted import Adapted
from lorax_ft.training.paging import PagedOptimizer, state_shardings

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """What a run keeps between its steps, of `ShapeDtypeStruct`s that say where they lie."""

    train: PyTree
    frozen: PyTree
    opt_state: PyTree
    out_shardings: tuple[PyTree, PyTree] | None  # for `make_train_step`


def place(adapted: Adapted, tx: Any, mesh: Mesh) -> Placement:
    """The trees of a run of `adapted`, which may be of shapes, with the optimizer `tx`.

    Raises ValueError where the mesh does not divide a parameter.
    """
    alone = SingleDeviceSharding(mesh.devices.flat[0]) if mesh.size == 1 else None
    lie = alone or training.shardings(adapted.params, mesh)
    train, frozen = trees.partition(_placed(adapted.params, lie), adapted.trainable)
    opt_state, out_shardings = jax.eval_shape(tx.init, train), None
    if alone and not isinstance(tx, PagedOptimizer):
        opt_state = _placed(opt_state, alone)
    else:
        lie = state_shardings(tx, opt_state, train, mesh)
        opt_state = _placed(opt_state, lie)
        out_shardings = (training.shardings_of(train), lie)
    return Placement(train=train, frozen=frozen, opt_state=opt_state, out_shardings=out_shardings)


def placed(array: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """An array's shape with where it lies."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _placed(tree: PyTree, lie: Any) -> PyTree:
    """The shapes of a tree's arrays with a sharding for all of them, or a tree of such."""
    if isinstance(lie, jax.sharding.Sharding):
        return jax.tree.map(lambda array: placed(array, lie), tree)
    return jax.tree.map(placed, tree, lie)
