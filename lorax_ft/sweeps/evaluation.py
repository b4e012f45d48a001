"""Evaluations of slots: all members on each batch at once, or few of them one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lorax_ft.data import evaluation_batches
from lorax_ft.prediction import Evaluation, Totals
from lorax_ft.sweeps.program import Program

PyTree = Any


def evaluate_slots(
    program: Program, train: PyTree, own: PyTree, slots: Sequence[int], part: str
) -> dict[int, Evaluation]:
    """What a split says of the members in some slots, by slot.

    Side by side, where less than half of the slots are asked for, a smaller program computes one
    after another; both are compiled when first needed.
    """
    if not slots:
        return {}
    dataset = program.source.dataset
    totals = {i: Totals(dataset.task, dataset.label_names) for i in slots}
    loader = program.group.first.data.loader
    asked = np.isin(np.arange(program.slots), list(slots))
    for _, batch in evaluation_batches(dataset.part(part), loader, pad_id=dataset.pad_id):
        if not program.vectorized or 2 * len(slots) >= program.slots:
            found = jax.device_get(program.eval_every(train, own, program.shared, asked, batch))
            for i in slots:
                loss, weight, extras = jax.tree.map(lambda x: x[i], found)  # noqa: B023
                totals[i].add(batch, loss, weight, extras)
        else:
            for i in slots:
                index = np.int32(i)
                totals[i].add(batch, *program.eval_one(train, own, program.shared, index, batch))
    return {i: total.evaluation() for i, total in totals.items()}
