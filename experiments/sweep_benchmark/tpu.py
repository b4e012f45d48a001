"""What a step of K members takes on a TPU, by its compiler's estimates: cycles for each member.

    python experiments/sweep_benchmark/tpu.py --members=1,2,4,8,16,32
    python experiments/sweep_benchmark/tpu.py --members=1,16 --rows=1

Needs no TPU but its compiler (`pip install 'jax[tpu]'`). A LLaMA of 1.0 billion parameters in
bfloat16 with LoRA of rank 16 on all linear layers, `--rows` of 128 tokens for each member; nothing
is allocated. The estimates are summed as in experiments/targets. Each program is a row of tpu.csv
beside this file, written when it is compiled, in place of an earlier one of its kind.
"""

from __future__ import annotations

import csv
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "targets"))

from absl import app, flags
from chips import chip, listing, total
from jax.sharding import SingleDeviceSharding
from stacked import LENGTH, LLAMA_1B, lower, make

HERE = pathlib.Path(__file__).resolve().parent
PEAK = 2**18  # floating-point operations a cycle of a v5p, whose products reach it by the estimates
KEY = ("target", "rows", "remat", "members")  # what tells one program from another

_MEMBERS = flags.DEFINE_list("members", ["1", "2", "4", "8", "16", "32"], "how many at once")
_ROWS = flags.DEFINE_integer("rows", 8, "rows of a member's batch")
_TARGET = flags.DEFINE_string("target", "v5p", "the TPU, as in tpu-v5p")
_REMAT = flags.DEFINE_string("remat", "products", "as ComputeConfig.remat")
_OPERATIONS = flags.DEFINE_integer("operations", 0, "how many operations of each to print")
_TEXT = flags.DEFINE_string("text", "", "folder for the compiled programs")


def measured(slots: int) -> dict[str, Any]:
    """A row of the table: the program of so many members, compiled."""
    sharding = SingleDeviceSharding(chip(_TARGET.value))
    sweep = make(LLAMA_1B, _ROWS.value, remat=_REMAT.value)
    compiled = lower(sweep, slots, sharding).compile()
    text = compiled.as_text()
    if _TEXT.value:
        (pathlib.Path(_TEXT.value) / f"rows{_ROWS.value}_members{slots}.txt").write_text(text)
    if _OPERATIONS.value:
        print(listing(text, _OPERATIONS.value), flush=True)
    memory, cycles = compiled.memory_analysis(), total(text, _TARGET.value)
    return {
        "target": _TARGET.value,
        "rows": _ROWS.value,
        "remat": _REMAT.value,
        "members": slots,
        "megacycles": cycles / 1e6,
        "each": cycles / slots / 1e6,
        "arguments_gib": memory.argument_size_in_bytes / 2**30,
        "temporaries_gib": memory.temp_size_in_bytes / 2**30,
    }


def least(rows: int) -> float:
    """Megacycles that the frozen products of one member take at a v5p's peak: outputs, and the
    gradients of their inputs."""
    size, inner = LLAMA_1B.hidden_size, LLAMA_1B.intermediate_size
    of_keys = LLAMA_1B.kv_heads * LLAMA_1B.size_of_head
    layer = 2 * size * size + 2 * size * of_keys + 3 * size * inner
    weights = LLAMA_1B.num_hidden_layers * layer + LLAMA_1B.vocab_size * size
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
