"""What each method costs on MiniLM: a training step, its memory, and a prediction afterwards.

    python experiments/methods/cost.py

Every method of configs/trec.py is compiled for 32 texts of 32 tokens. Steps and predictions are
then run in turns, round by round, so that a busy machine slows all alike; times are medians over
rounds of the ratio to full fine-tuning in the same round. Writes cost.csv and cost.md beside this
file.
"""

from __future__ import annotations

import csv
import pathlib
import runpy
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from lorax_ft import methods, training, trees
from lorax_ft.adapted import load_adapted, make_apply
from lorax_ft.config import ExperimentConfig, parse

HERE = pathlib.Path(__file__).resolve().parent
CONFIG = runpy.run_path(str(HERE.parent.parent / "configs" / "trec.py"))
BATCH, LENGTH = 32, 32
LABELS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
BASELINE = "full"

_ROUNDS = flags.DEFINE_integer("rounds", 9, "how often everything is timed")


class Method:
    """A method's compiled step and prediction, and what can be said of it without running them."""

    def __init__(self, name: str):
        config = parse(CONFIG["get_config"](name), ExperimentConfig)
        adapted = load_adapted(config, "sequence_classification", LABELS)
        batch = make_batch(adapted.model.config.vocab_size)
        self.inputs = {key: value for key, value in batch.items() if key != "labels"}
        apply = make_apply(adapted.model)
        train, frozen = trees.partition(adapted.params, adapted.trainable)
        tx = training.build_optimizer(config.optimizer, total_steps=1000)
        state = tx.init(train)
        objective = training.OBJECTIVES["sequence_classification"]
        step = training.make_train_step(apply, objective, tx)
        key = jax.random.key(0)
        self._step = step.lower(train, state, frozen, batch, key).compile()
        self._state, self._rest = (train, state), (frozen, batch, key)
        self.params, self.is_merged = adapted.params, True
        try:
            self.params = methods.merge(self.params)
        except ValueError:  # no kernel can express what it adds
            self.is_merged = False
        self.is_merged &= not {"prompt", "prefix"} & set(self.params)  # these stay in front
        self.params = jax.tree.map(jnp.copy, self.params)  # a step takes its arrays over
        self._predict = jax.jit(apply).lower(self.params, self.inputs).compile()
        counts = trees.count(adapted.params, adapted.trainable)
        memory: Any = self._step.memory_analysis()
        self.facts = {
            "method": name,
            "trainable": counts.trainable,
            "share": counts.trainable / counts.total,
            "parameters_mb": counts.bytes / 1e6,
            "optimizer_mb": sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6,
            "temporary_mb": memory.temp_size_in_bytes / 1e6,
            "merged": self.is_merged,
        }

    def step(self) -> None:
        train, state, metrics = self._step(*self._state, *self._rest)
        self._state = (train, state)
        jax.block_until_ready(metrics)

    def predict(self) -> None:
        jax.block_until_ready(self._predict(self.params, self.inputs))


def make_batch(vocabulary: int) -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    ids = random.integers(5, vocabulary, (BATCH, LENGTH)).astype(np.int32)
    labels = random.integers(0, len(LABELS), BATCH).astype(np.int32)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels}
    return {name: jnp.asarray(array) for name, array in batch.items()}


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(compiled: list[Method], rounds: int) -> list[dict[str, Any]]:
    """A row for each method, times relative to the baseline's."""
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds + 1):  # the first one warms up
        for method in compiled:
            for what in ("step", "predict"):
                taken = seconds(getattr(method, what))
                times.setdefault((method.facts["method"], what), []).append(taken)
    rows = []
    for method in compiled:
        row = dict(method.facts)
        for what in ("step", "predict"):
            pairs = zip(times[row["method"], what][1:], times[BASELINE, what][1:])
            row[what] = statistics.median(own / base for own, base in pairs)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | trainable | share | parameters, MB | optimizer, MB | temporaries of a step, MB "
        "| step, to full's | prediction, to full's |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        how = "merged" if r["merged"] else "as it is"
        lines.append(
            f"| {r['method']} | {r['trainable']:,} | {r['share']:.2%} | {r['parameters_mb']:.1f} "
            f"| {r['optimizer_mb']:.2f} | {r['temporary_mb']:.0f} | {r['step']:.2f} "
            f"| {r['predict']:.2f} ({how}) |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    rows = measure([Method(name) for name in CONFIG["METHODS"]], _ROUNDS.value)
    with (HERE / "cost.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (HERE / "cost.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    app.run(main)
