"""What all parts of the benchmark share: shapes, the arithmetic that must be done, the table.

Of the standard library alone, so that either framework's process may import it.
"""

from __future__ import annotations

import csv
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
MODELS = {
    "llama-3-8b": HERE.parents[1] / "configs" / "models" / "llama-3-8b",
    "tiny": HERE / "tiny",
}
BEGUN = "ACCELERATOR_PART_BEGUN"  # when run.py started this process, by time.time()
RANK = 16
LEARNING_RATE = 1e-4
GIB = 2**30
COLUMNS = (
    "part",
    "by",  # whose step it is
    "model",
    "variant",
    "members",
    "rows",
    "length",
    "device",
    "step_s",  # median
    "fastest_s",
    "tokens_per_s",
    "tflop",  # that a step must do: see `step_flops`
    "mfu",  # of the device's dense bfloat16 peak
    "peak_gib",  # by the allocator; empty where an earlier variant of the process had a higher one
    "compiler_gib",  # by the compiler: what it laid out, or what was planned
    "start_s",  # from the process' start until the first variant was built
    "build_s",  # compilation and the first step
    "losses",  # first and last
    "note",
)


def read_config(model: str) -> dict[str, Any]:
    """A model's config.json."""
    return json.loads((MODELS[model] / "config.json").read_text())


def step_flops(config: dict[str, Any], rows: int, length: int, rank: int = RANK) -> float:
    """FLOPs that a LoRA step of a LLaMA, with adapters on all linear layers, cannot do without.

    With N frozen weights that are multiplied with (the layers' and the head's), forward 2N a token
    and backward 2N, the gradients of inputs alone; 6 for each adapter weight; of causal attention
    two products of each seen pair forward and four backward. What is computed again counts for
    nothing, and neither do norms, the softmax and the look-up of embeddings.

    >>> round(step_flops(read_config("llama-3-8b"), 4, 2048) / 1e12)
    261
    """
    size, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim") or size // heads
    query, key = heads * head, kv_heads * head
    kernels = [(size, query), (size, key), (size, key), (query, size)]
    kernels += [(size, inner), (size, inner), (inner, size)]
    layers = config["num_hidden_layers"]
    frozen = layers * sum(a * b for a, b in kernels) + size * config["vocab_size"]
    adapters = layers * sum(rank * (a + b) for a, b in kernels)
    pairs = rows * length * (length + 1) / 2
    return rows * length * (4 * frozen + 6 * adapters) + (2 + 4) * 2 * pairs * query * layers


def write_row(path: str, row: dict[str, Any]) -> None:
    """Appends a row to the table at once, and prints it."""
    if unknown := set(row) - set(COLUMNS):
        raise ValueError(f"{sorted(unknown)} are no columns of the table: {COLUMNS}.")
    rounded = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
    file = pathlib.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    is_new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(rounded)
    print(" ".join(f"{k}={v}" for k, v in rounded.items()), flush=True)


def read_rows(path: str) -> list[dict[str, str]]:
    """The rows of the table; none where there is no table yet."""
    file = pathlib.Path(path)
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def since_begun() -> float:
    """Seconds since this process was started, imports among them where run.py has started it."""
    return time.time() - float(os.environ.get(BEGUN, _IMPORTED))


_IMPORTED = time.time()


def timed(step: Callable[[], float], steps: int, warm_up: int = 2) -> tuple[list[float], list]:
    """(seconds of each step, losses of all): `step` makes one, waits for it and gives its loss."""
    times, losses = [], []
    for number in range(warm_up + steps):
        start = time.perf_counter()
        losses.append(step())
        if number >= warm_up:
            times.append(time.perf_counter() - start)
    return times, losses
