"""What one linear layer costs a TPU, forward and backward, by its compiler's estimates.

    python experiments/targets/linear.py

Needs no TPU but its compiler (`pip install 'jax[tpu]'`). A kernel of 4096 x 4096 in bfloat16, 2,048
tokens: the output, the gradient of the input and, where there is an adapter, those of its factors
(rank 16, float32). Nothing is allocated. Writes linear_layer.csv beside this file;
`--operations` prints what each program spends its cycles on. `--peer_script` compiles another
library's layers of the same shapes: it is given a topology and prints a line for each, its name,
its cycles and its temporaries in MiB.
"""

from __future__ import annotations

import csv
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from chips import chip, listing, total
from jax.sharding import SingleDeviceSharding

from lorax_ft import trees
from lorax_ft.devices import find_device
from lorax_ft.methods import LoRA
from lorax_ft.quantization import QuantizationConfig, quantize_array

HERE = pathlib.Path(__file__).resolve().parent
RANK = 16
LAYERS = {
    "frozen kernel": ("none", False),
    "LoRA": ("none", True),
    "LoRA, int8 kernel": ("int8", True),
    "LoRA, NF4 kernel": ("nf4", True),
    "LoRA, NF4 kernel with double quantisation": ("nf4 double", True),
    "LoRA, NF4 kernel dequantised once": ("nf4 once", True),
}

_TARGETS = flags.DEFINE_list("targets", ["v5p", "v6e"], "chips")
_TOKENS = flags.DEFINE_integer("tokens", 2048, "rows of the input")
_OPERATIONS = flags.DEFINE_integer("operations", 0, "how many operations of each to print")
_SIZE = flags.DEFINE_integer("size", 4096, "inputs and outputs of the kernel")
_CSV = flags.DEFINE_string("csv", str(HERE / "linear_layer.csv"), "the table; none where empty")
_PEER_SCRIPT = flags.DEFINE_string("peer_script", None, "script that compiles another's layers")
_ONLY = flags.DEFINE_string("only", "", "only layers whose name has this")


def base(kind: str) -> Any:
    """The shapes of a kernel: a plain array, or a leaf that stands for one."""
    kernel = jax.ShapeDtypeStruct((_SIZE.value, _SIZE.value), jnp.bfloat16)
    if kind == "none":
        return kernel
    name, *how = kind.split()
    config = QuantizationConfig(kind=name, double_quantization="double" in how)
    return quantize_array(kernel, config)


def adapted(kernel: Any) -> LoRA:
    """The shapes of a LoRA leaf round it."""
    factor = jax.ShapeDtypeStruct((RANK, _SIZE.value), jnp.float32)
    return LoRA(
        base=kernel,
        a=factor,
        b=factor,
        scale=jax.ShapeDtypeStruct((), jnp.float32),
        rank=jax.ShapeDtypeStruct((), jnp.int32),
    )


def compiled(kind: str, has_adapter: bool, device: Any, tokens: int = 2048) -> Any:
    """Output, gradient of the input and of the trained factors, compiled for a chip."""
    kernel = base(kind)
    params = {"kernel": adapted(kernel) if has_adapter else kernel}
    train, frozen = trees.partition(params) if has_adapter else ({"kernel": None}, params)

    def layer(train, frozen, x, dy):
        def apply(train, x):
            kernel = trees.combine(train, frozen)["kernel"]
            if "once" in kind:  # the backward pass has the dense copy that the leaf would not keep
                kernel = kernel.replace(base=kernel.base.dense())
            return x @ kernel if isinstance(kernel, jax.Array) else kernel.linear(x)

        y, pull = jax.vjp(apply, train, x)
        return y, pull(dy)

    x = jax.ShapeDtypeStruct((tokens, _SIZE.value), jnp.bfloat16)
    sharding = SingleDeviceSharding(device)
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), (train, frozen, x, x)
    )
    return jax.jit(layer).lower(*shapes).compile()


def peers(targets: list[str]) -> list[dict[str, Any]]:
    """The other library's rows of the table."""
    rows: dict[str, dict[str, Any]] = {}
    for target in targets:
        wired = find_device(f"tpu-{target}").topologies[0]
        command = [sys.executable, _PEER_SCRIPT.value, f"{target}:{wired}"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        for line in done.stdout.splitlines():
            found = re.fullmatch(r"(.+?) +([\d,]+) cycles, temporaries (\d+) MiB", line)
            if found:
                row = rows.setdefault(found[1], {"layer": found[1]})
                row[f"{target} kilocycles"] = round(int(found[2].replace(",", "")) / 1e3)
                row[f"{target} temporary MiB"] = int(found[3])
    return list(rows.values())


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    rows: list[dict[str, Any]] = []
    for name, (kind, has_adapter) in LAYERS.items():
        if _ONLY.value not in name:
            continue
        row: dict[str, Any] = {"layer": name}
        for target in _TARGETS.value:
            program = compiled(kind, has_adapter, chip(target), _TOKENS.value)
            text = program.as_text()
            cycles = total(text, target)
            row[f"{target} kilocycles"] = round(cycles / 1e3)
            temporary = program.memory_analysis().temp_size_in_bytes
            row[f"{target} temporary MiB"] = round(temporary / 2**20)
            print(target, name, f"{cycles:,}", f"{temporary / 2**20:.0f} MiB", flush=True)
            if _OPERATIONS.value:
                print(listing(text, _OPERATIONS.value), flush=True)
        rows.append(row)
    if _PEER_SCRIPT.value:
        rows += peers(_TARGETS.value)
    if not _CSV.value:
        return
    with open(_CSV.value, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    app.run(main)
