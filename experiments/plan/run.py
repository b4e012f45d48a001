"""Plans of LLaMA at 7 to 70 billion parameters on cards and TPUs that are not here.

    python experiments/plan/run.py
    python experiments/plan/run.py --only=tpu

Needs no weights and no accelerator; rows of TPUs want their compiler (`pip install
'jax[tpu]'`), rows of GPUs want jax's CUDA plugin, and without it are reckoned by XLA for CPU, which
the table says. Each row is a process of its own, one after another. `--only` takes the rows whose
name has that in it. Writes results.csv and results.md beside this file; rows that were not run
again stay as results.csv has them. memory.png is drawn anew where the plans of all rows are here.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import pathlib
import pickle
import re
import subprocess
import sys
import time
from typing import Any

from absl import app, flags

HERE = pathlib.Path(__file__).resolve().parent
FIGURE = HERE / "memory.png"
CONFIG = HERE.parent.parent / "configs" / "llama.py"
STORE = HERE.parent.parent / ".cache" / "plan"  # of rows that are not run again
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Row:
    """A config of configs/llama.py on a device, and what sizes are to be as large as fits."""

    argument: str
    device: str
    mesh: str | None = None
    find: tuple[str, ...] = ()  # each with the other sizes as they are
    batch_size: int = 1
    length: int = 512
    paged: bool = False  # optimizer states on the host

    @property
    def name(self) -> str:
        paged = "paged" if self.paged else None
        return " ".join(part for part in (self.argument, self.device, self.mesh, paged) if part)

    @property
    def file(self) -> pathlib.Path:
        """Where its plans are kept."""
        return STORE / (re.sub(r"[^\w=-]+", "_", self.name) + ".pickle")


BOTH = ("batch", "length")
ROWS = (
    Row("7b-qlora64", "rtx-3070"),
    Row("65b-qlora16", "a6000", find=BOTH),
    Row("65b-qlora64", "a6000"),
    Row("65b-qlora64", "a6000", paged=True, find=BOTH),
    Row("65b-qlora16", "a100-80", find=BOTH),
    Row("65b-qlora64", "a100-80", find=BOTH),
    Row("3-70b-qlora64", "a6000"),
    Row("3-70b-qlora16", "a100-80", find=BOTH),
    Row("3-70b-qlora64", "h100:8", find=BOTH, batch_size=8),
    Row("3-70b-qlora16", "tpu-v5e:4x4", "fsdp=16", ("batch",), 16),
    Row("3-70b-qlora16", "tpu-v5e:4x4", "fsdp=4,tensor=4", ("length",), 4),
    Row("3-70b-qlora16", "tpu-v6e:16x16", "data=16,fsdp=16", ("batch",), 256),
)
# Full fine-tuning, whose memory is arithmetic: (config of configs/llama.py, its param_dtype).
FULL = (("65b-full", "bfloat16"), ("65b-full", "float32"), ("7b-full", "bfloat16"))

_ONLY = flags.DEFINE_string("only", "", "rows whose name has this in it")
_ROW = flags.DEFINE_integer("row", None, "one row, by its number: what the processes are given")


def make(row: Row) -> None:
    """Keeps a row's plans: as it is, and then at each size as large as fits."""
    from lorax_ft import planning
    from lorax_ft.planning import search
    from lorax_ft.planning.command import parse_mesh

    target = planning.parse_target(row.device)
    planning.prepare_process(target)
    config = search.sized(config_of(row.argument), "length", row.length)
    config = search.sized(config, "batch", row.batch_size)
    if row.paged:
        optimizer = dataclasses.replace(config.optimizer, paged=True)
        config = dataclasses.replace(config, optimizer=optimizer)
    if row.mesh:
        config = dataclasses.replace(config, mesh=parse_mesh(row.mesh))
    plan_of = functools.partial(
        planning.make_plan, target=target, compiler=planning.compiler(target)
    )
    start = time.process_time()
    first = plan_of(config)
    kept = {"row": row, "plan": first, "largest": [], "seconds": time.process_time() - start}
    print(planning.plan_text(first), flush=True)
    row.file.write_bytes(pickle.dumps(kept))
    for what in row.find:
        kept["largest"].append(planning.largest(config, first, what, plan_of))
        print(planning.largest_text(kept["largest"][-1]), flush=True)
        row.file.write_bytes(pickle.dumps(kept))


def config_of(argument: str, param_dtype: str = "bfloat16") -> Any:
    """A config of configs/llama.py."""
    import runpy

    from lorax_ft.config import ExperimentConfig, parse

    values = runpy.run_path(str(CONFIG))["get_config"](argument)
    values.model.compute.param_dtype = param_dtype
    return parse(values, ExperimentConfig)


def full_rows() -> list[dict[str, Any]]:
    """What full fine-tuning keeps between steps, and the gradients, to the byte."""
    import jax

    from lorax_ft import memory, planning
    from lorax_ft.planning import shapes

    planning.prepare_process(planning.parse_target("cpu"))
    rows = []
    for argument, dtype in FULL:
        config = config_of(argument, dtype)
        step = shapes.make_step(config, shapes.describe(config), jax.devices("cpu"))
        parts = memory.state_parts(step.train, step.frozen, step.opt_state)
        count = sum(array.size for array in jax.tree.leaves(step.train))
        gradients = memory.tree_bytes(step.train)
        sizes = {
            "weights": parts["trained"],
            "gradients": gradients,
            "optimizer states": parts["optimizer"],
            "in all": parts["trained"] + gradients + parts["optimizer"],
        }
        rows.append(
            {"config": argument, "param_dtype": dtype, "parameters": f"{count:,}"}
            | {f"{name}, GB": f"{size / 1e9:.1f}" for name, size in sizes.items()}
        )
    return rows


def cells(found: dict[str, Any]) -> dict[str, Any]:
    """A row of results.csv."""
    row, plan, largest = found["row"], found["plan"], found["largest"]
    parts = {name: round(size / GIB, 3) for name, size in plan.parts.items()}
    bound = plan.roofline
    return {
        "config": row.argument,
        "device": row.device,
        "mesh": row.mesh or "",
        "states": _states(row),
        "batch": plan.batch_size,
        "length": plan.length,
        "compiler": "CPU, standing in" if plan.stands_in else plan.compiler.split(",")[0],
        **{f"{name}_gib": size for name, size in parts.items()},
        "host_gib": round(plan.host / GIB, 3),
        "needed_gib": None if plan.needed is None else round(plan.needed / GIB, 2),
        "usable_gib": None if plan.usable is None else round(plan.usable / GIB, 2),
        "fits": plan.fits,
        "tflop": round(plan.flops / 1e12, 2),
        "gb_moved": None if plan.traffic is None else round(plan.traffic / 1e9, 1),
        "gb_sent": round(sum(c.sent for c in plan.collectives) / 1e9, 2),
        "roofline_s": None if bound is None else float(f"{bound.seconds:.3g}"),
        "bound_by": None if bound is None else bound.bound,
        "gigacycles": None if plan.cycles is None else round(plan.cycles.total / 1e9, 3),
        "largest": ", ".join(map(_largest_text, largest)),
        "not_fitting": ", ".join(f"{one.what} {one.refused}" for one in largest if one.refused),
        "processor_s": round(found["seconds"], 1),
    }


def write(results: list[dict[str, Any]]) -> None:
    """The tables and the picture."""
    from lorax_ft import planning

    table_file = HERE / "results.csv"
    with table_file.open(newline="") as file:
        known = {_key(row): row for row in csv.DictReader(file)}
    known |= {_key(row): row for row in map(cells, results)}
    order = [(row.argument, row.device, row.mesh or "", _states(row)) for row in ROWS]
    rows = [known[key] for key in order if key in known]
    with table_file.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    columns = ("config", "device", "mesh", "states", "batch", "length", "compiler", "needed_gib")
    columns += ("usable_gib", "fits", "tflop", "roofline_s", "bound_by", "gigacycles", "largest")
    tables = [table([{name: row[name] for name in columns} for row in rows]), table(full_rows())]
    (HERE / "results.md").write_text("\n".join(tables))
    if len(results) == len(ROWS):
        planning.plot_plans({found["row"].name: found["plan"] for found in results}, FIGURE)


def _largest_text(found: Any) -> str:
    """The size, as one that fits where there is a larger one and none was tried that does not."""
    least = "at least " if found.refused is None and not found.is_last else ""
    return f"{found.what} {least}{found.size}"


def _key(cells: dict[str, Any]) -> tuple[str, ...]:
    return tuple(cells[name] for name in ("config", "device", "mesh", "states"))


def _states(row: Row) -> str:
    return "on the host" if row.paged else ""


def table(rows: list[dict[str, Any]]) -> str:
    """Rows in Markdown."""
    lines = [" | ".join(rows[0]), "|".join("---" for _ in rows[0])]
    lines += [
        " | ".join("" if value is None else str(value) for value in row.values()) for row in rows
    ]
    return "".join(f"| {line} |\n" for line in lines)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    STORE.mkdir(parents=True, exist_ok=True)
    if _ROW.value is not None:
        make(ROWS[_ROW.value])
        return
    for number, row in enumerate(ROWS):
        if _ONLY.value in row.name:
            print(f"--- {row.name}", flush=True)
            subprocess.run([sys.executable, __file__, f"--row={number}"], check=False)
    write([pickle.loads(row.file.read_bytes()) for row in ROWS if row.file.exists()])


if __name__ == "__main__":
    app.run(main)
