"""What a step of K members takes on a TPU, by its compiler's estimates: cycles for each member.

    python experiments/sweep_benchmark/tpu.py --members=1,2,4,8,16,32
    python experiments/sweep_benchmark/tpu.py --members=1,16 --rows=1

Needs no TPU but its compiler (`pip install libtpu`). A LLaMA of 1.2 billion parameters in bfloat16
with LoRA of rank 16 on all linear layers, `--rows` of 128 tokens for each member; nothing is
allocated. The estimates are summed as in experiments/targets. Each program is a row of
tpu.csv beside this file, written when it is compiled, in place of an earlier one of its kind.
"""

from __future__ import annotations

import csv
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "targets"))

import jax
import jax.numpy as jnp
from absl import app, flags
from chips import chip, listing, total
from jax.sharding import SingleDeviceSharding

from lorax_ft import inspection
from lorax_ft.adapted import Base, make_outputs
from lorax_ft.config import ExperimentConfig, parse
from lorax_ft.experiment import make_optimizer
from lorax_ft.models import LlamaConfig, build
from lorax_ft.sweeps import members
from lorax_ft.sweeps.step import make_train_step
from lorax_ft.training import OBJECTIVES

HERE = pathlib.Path(__file__).resolve().parent
CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)
LENGTH = 128
PEAK = 2**18  # floating-point operations a cycle of a v5p, whose products reach it by the estimates
KEY = ("target", "rows", "remat", "members")  # what tells one program from another
NO_DATA = {"data": {"source": {"train": "none"}}}

_MEMBERS = flags.DEFINE_list("members", ["1", "2", "4", "8", "16", "32"], "how many at once")
_ROWS = flags.DEFINE_integer("rows", 8, "rows of a member's batch")
_TARGET = flags.DEFINE_string("target", "v5p", "the TPU, as in tpu-v5p")
_REMAT = flags.DEFINE_string("remat", "products", "as ComputeConfig.remat")
_OPERATIONS = flags.DEFINE_integer("operations", 0, "how many operations of each to print")
_TEXT = flags.DEFINE_string("text", "", "folder for the compiled programs")


def lower(slots: int, sharding: Any) -> Any:
    """The sweep's own training step of so many members, lowered on shapes alone."""
    options: dict[str, Any] = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    model = build(CONFIG, task="causal_lm", remat=_REMAT.value, **options)
    ids = jax.ShapeDtypeStruct((_ROWS.value, LENGTH), jnp.int32)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    batch["weights"] = jax.ShapeDtypeStruct((_ROWS.value,), jnp.float32)
    uses = inspection.inspect(model.apply, model.shapes(), {"input_ids": ids})
    config = parse({"model": {"path": "none"}, **NO_DATA, "lora": {"rank": 16}}, ExperimentConfig)
    tx = make_optimizer(config, 1000)

    def halves(params):
        base = Base(model=model, params=params, head=(), num_labels=None, uses=uses, config=config)
        found = members.part(base, config, drops=False, fingerprint="")
        return found.train, tx.init(found.train), found.own, found.shared

    train, opt_state, own, shared = jax.eval_shape(halves, model.shapes())
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    count = jax.ShapeDtypeStruct((), jnp.int32)  # of steps; and as the number of a size

    def placed(tree: Any, *front: int) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*front, *x.shape), x.dtype, sharding=sharding), tree
        )

    step = make_train_step(make_outputs(model), OBJECTIVES["causal_lm"], tx)
    stacked = (placed(x, slots) for x in (train, opt_state, own))
    rest = (placed(x, slots) for x in (key, count, count, batch))
    return step.lower(*stacked, placed(shared), *rest)


def measured(slots: int) -> dict[str, Any]:
    """A row of the table: the program of so many members, compiled."""
    compiled = lower(slots, SingleDeviceSharding(chip(_TARGET.value))).compile()
    text = compiled.as_text()
    if _TEXT.value:
        (pathlib.Path(_TEXT.value) / f"rows{_ROWS.value}_members{slots}.txt").write_text(text)
    if _OPERATIONS.value:
        print(listing(text, _OPERATIONS.value), flush=True)
    memory = compiled.memory_analysis()
    return {
        "target": _TARGET.value,
        "rows": _ROWS.value,
        "remat": _REMAT.value,
        "members": slots,
        "megacycles": total(text) / 1e6,
        "each": total(text) / slots / 1e6,
        "arguments_gib": memory.argument_size_in_bytes / 2**30,
        "temporaries_gib": memory.temp_size_in_bytes / 2**30,
    }


def least(rows: int) -> float:
    """Megacycles that the frozen products of one member take at a v5p's peak: outputs, and the
    gradients of their inputs."""
    size, inner = CONFIG.hidden_size, CONFIG.intermediate_size
    of_keys = CONFIG.kv_heads * CONFIG.size_of_head
    layer = 2 * size * size + 2 * size * of_keys + 3 * size * inner
    weights = CONFIG.num_hidden_layers * layer + CONFIG.vocab_size * size
    return 4 * weights * rows * LENGTH / PEAK / 1e6


def write(row: dict[str, Any]) -> None:
    """Puts a row into the table, and beside each what it takes of the single step's cycles."""
    path = HERE / "tpu.csv"
    rows: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    kept = [r for r in rows if any(str(r[k]) != str(row[k]) for k in KEY)]
    rows = sorted([*kept, row], key=lambda r: (r["target"], int(r["rows"]), int(r["members"])))
    alone = {
        tuple(r[k] for k in ("target", "rows", "remat")): float(r["each"])
        for r in ({k: str(v) for k, v in r.items()} for r in rows)
        if r["members"] == "1"
    }
    for r in rows:
        of = alone.get(tuple(str(r[k]) for k in ("target", "rows", "remat")))
        r["of_one"] = "" if of is None else f"{float(r['each']) / of:.3f}"
        r["of_peak"] = f"{least(int(r['rows'])) / float(r['each']):.3f}"
        for name in ("megacycles", "each", "arguments_gib", "temporaries_gib"):
            r[name] = f"{float(r[name]):.3f}"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    for slots in map(int, _MEMBERS.value):
        row = measured(slots)
        write(row)
        print(row, flush=True)


if __name__ == "__main__":
    app.run(main)
