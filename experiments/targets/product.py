"""What one product with an NF4 kernel costs a TPU: dequantised by XLA, and fused.

    python experiments/targets/product.py --rows=1,16,256,2048

`x [rows, 4096] @ kernel [4096, 4096]` in bfloat16, nothing else. Needs no TPU but its compiler
(`pip install 'jax[tpu]'`). Cycles are of the arithmetic, as chips.py counts them; `memory` are
those in which operands and result pass the chip's memory once, beside them. Writes product.csv
beside this file.
"""

from __future__ import annotations

import csv
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from chips import chip, total
from jax.sharding import SingleDeviceSharding

from lorax_ft.devices import find_device
from lorax_ft.quantization import QuantizationConfig, quantize_array

HERE = pathlib.Path(__file__).resolve().parent
WAYS = {
    "bfloat16": lambda kernel, x: x @ kernel,
    "NF4 by XLA": lambda kernel, x: x @ kernel.matrix(),
    "NF4 fused": lambda kernel, x: kernel.linear(x),
}

_TARGETS = flags.DEFINE_list("targets", ["v5e", "v5p", "v6e"], "chips")
_ROWS = flags.DEFINE_list("rows", ["1", "16", "256", "2048"], "rows of x")
_SIZE = flags.DEFINE_integer("size", 4096, "inputs and outputs of the kernel")


def measured(name: str, way: str, rows: int) -> dict[str, Any]:
    """A row of the table."""
    kernel: Any = jax.ShapeDtypeStruct((_SIZE.value, _SIZE.value), jnp.bfloat16)
    if way != "bfloat16":
        kernel = quantize_array(kernel, QuantizationConfig())
    x = jax.ShapeDtypeStruct((rows, _SIZE.value), jnp.bfloat16)
    sharding, device = SingleDeviceSharding(chip(name)), find_device(f"tpu-{name}")
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), (kernel, x)
    )
    compiled = jax.jit(WAYS[way]).lower(*shapes).compile()
    size = sum(s.size * s.dtype.itemsize for s in jax.tree.leaves((kernel, x, x)))
    return {
        "target": name,
        "rows": rows,
        "way": way,
        "kilocycles": round(total(compiled.as_text(), name) / 1e3),
        "memory kilocycles": round(size / device.bandwidth * device.clock / 1e3),
    }


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    table = []
    for name in _TARGETS.value:
        for rows in map(int, _ROWS.value):
            for way in WAYS:
                table.append(measured(name, way, rows))
                print(*table[-1].values(), sep="\t", flush=True)
    with open(HERE / "product.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    app.run(main)
