"""Loads a LLaMA of 3 B parameters in NF4 and trains a QLoRA step, watching resident memory.

    export XLA_FLAGS=--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED
    python experiments/large_model/run.py --write=/tmp/large_model
    python experiments/large_model/run.py --model=/tmp/large_model

The first command writes random weights as sharded safetensors in bfloat16, in a process of its own
so that its memory does not count. The second writes results.csv, results.json and results.png
beside this file. `--layers=1` is a small model to try it with, of 0.3 B parameters.
"""

from __future__ import annotations

import csv
import json
import os
import pathlib
import threading
import time
import zlib

import jax
import ml_dtypes
import numpy as np
from absl import app, flags

from lorax_ft import inspection, methods, training, trees
from lorax_ft.adapted import make_outputs
from lorax_ft.models import LlamaConfig, build, hub, hugging_face, matching, tensor_files
from lorax_ft.quantization import QuantizationConfig

HERE = pathlib.Path(__file__).resolve().parent
LENGTH = 64

_WRITE = flags.DEFINE_string("write", None, "folder to write the random model to")
_MODEL = flags.DEFINE_string("model", None, "folder to read it from")
_LAYERS = flags.DEFINE_integer("layers", 28, "layers of the model that is written")
_REMAT = flags.DEFINE_string("remat", "full", "what the backward pass computes again")
_INTERVAL = flags.DEFINE_float("interval", 0.5, "seconds between two looks at the memory")
_OUT = flags.DEFINE_string("out", str(HERE), "folder of the results")


def write(folder: pathlib.Path, layers: int) -> None:
    """A model of the shape of Llama 3.2 3B with 32,000 words and a head of its own."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=24,
        num_key_value_heads=8,
        intermediate_size=8192,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    model = build(config, task="causal_lm")
    shapes: dict[str, tuple[int, ...]] = {}
    for path, shape in trees.flatten(model.shapes()).items():
        for layer, name in matching.tensor_names(model, path, shape.shape).items():
            core = shape.shape if layer is None else shape.shape[1:]
            turned = hugging_face.is_turned(model.family.tables, path)
            shapes[name] = core[::-1] if turned else core

    def read(name: str) -> np.ndarray:
        if "norm" in name:
            return np.ones(shapes[name], ml_dtypes.bfloat16)
        random = np.random.default_rng(zlib.crc32(name.encode()))
        values = random.standard_normal(shapes[name], np.float32)
        values *= np.float32(0.02)
        return values.astype(ml_dtypes.bfloat16)

    sizes = {name: 2 * int(np.prod(shape)) for name, shape in shapes.items()}
    with tensor_files.new_directory(folder) as new:
        tensor_files.write_tensors(new, sizes, read, max_shard_bytes=10**9)
        described = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
        tensor_files.write_json(new / "config.json", {**config.to_hugging_face(), **described})
    print(f"{sum(sizes.values()) // 2:,} parameters in {folder}")


class Memory:
    """Resident memory by a thread: anonymous, and pages of files, which can be dropped."""

    def __init__(self, interval: float):
        self.rows: list[dict[str, object]] = []
        self.phase, self._interval, self._start = "start", interval, time.perf_counter()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def look(self) -> None:
        status = dict(
            line.split(":", 1)
            for line in pathlib.Path("/proc/self/status").read_text().splitlines()
        )
        row: dict[str, object] = {
            "seconds": round(time.perf_counter() - self._start, 2),
            "phase": self.phase,
        }
        for name, key in (("all_mb", "VmRSS"), ("anonymous_mb", "RssAnon"), ("file_mb", "RssFile")):
            row[name] = round(int(status[key].split()[0]) * 1024 / 1e6, 1)
        self.rows.append(row)

    def _watch(self) -> None:
        while not self._stopped.is_set():
            self.look()
            self._stopped.wait(self._interval)


def train_one_step(folder: pathlib.Path, memory: Memory) -> dict[str, object]:
    """Loads, quantises, adapts and trains a step on one row of random tokens."""
    memory.phase = "load and quantise"
    start = time.perf_counter()
    model, params = hub.load(
        folder,
        quantization=QuantizationConfig(),
        dtype="bfloat16",
        param_dtype="bfloat16",
        remat=_REMAT.value,
    )
    load_seconds = time.perf_counter() - start
    memory.phase = "add LoRA"
    uses = inspection.inspect(model.apply, params, model.input_shapes())
    config = methods.LoraConfig(targets="all-linear", rank=16)
    params, trainable = methods.add_methods(params, [config], jax.random.key(1), uses)
    counts = trees.count(params, trainable)
    train, frozen = trees.partition(params, trainable)
    del params
    optimizer = training.OptimizerConfig(learning_rate=1e-4, schedule="constant")
    tx = training.build_optimizer(optimizer, total_steps=10)
    state = tx.init(train)
    step = training.make_train_step(make_outputs(model), training.OBJECTIVES["causal_lm"], tx)
    ids = np.random.default_rng(2).integers(5, 32000, (1, LENGTH)).astype(np.int32)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}
    key = jax.random.key(3)
    memory.phase = "compile the step"
    compiled = step.lower(train, state, frozen, batch, key).compile()
    memory.phase = "step"
    start = time.perf_counter()
    train, state, metrics = compiled(train, state, frozen, batch, key)
    loss = float(metrics["loss"])
    step_seconds = time.perf_counter() - start
    needed = compiled.memory_analysis()
    bf16 = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {
        "parameters": counts.total - counts.trainable,
        "trainable": counts.trainable,
        "bf16_mb": round(bf16 / 1e6, 1),
        "kept_mb": round(counts.bytes / 1e6, 1),
        "step_arguments_mb": round(needed.argument_size_in_bytes / 1e6, 1),
        "step_temporary_mb": round(needed.temp_size_in_bytes / 1e6, 1),
        "remat": _REMAT.value,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "load_seconds": round(load_seconds, 1),
        "step_seconds": round(step_seconds, 1),
        "loss": round(loss, 4),
    }


def plot(rows: list[dict], result: dict, path: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    seconds = [row["seconds"] for row in rows]
    for name, label in (
        ("all_mb", "all resident"),
        ("anonymous_mb", "anonymous"),
        ("file_mb", "pages of files"),
    ):
        axis.plot(seconds, [row[name] / 1000 for row in rows], label=label)
    axis.axhline(
        result["bf16_mb"] / 1000, color="grey", linestyle="--", label="the model in bfloat16"
    )
    starts: dict[str, float] = {}
    for row in rows[1:]:  # the first is of the thread's own start
        starts.setdefault(row["phase"], row["seconds"])
    for phase, second in starts.items():
        axis.axvline(second, color="lightgrey", linewidth=0.8)
        axis.text(
            second,
            0.98,
            f" {phase}",
            rotation=90,
            va="top",
            fontsize=7,
            transform=axis.get_xaxis_transform(),
        )
    axis.set(xlabel="seconds", ylabel="GB", ylim=(0, None))
    axis.legend(loc="center left", fontsize=8)
    figure.savefig(path, format="png", dpi=120)


def main(argv: list[str]) -> None:
    if _WRITE.value is not None:
        write(pathlib.Path(_WRITE.value), _LAYERS.value)
        return
    if _MODEL.value is None:
        raise app.UsageError("give --write or --model")
    memory, out = Memory(_INTERVAL.value), pathlib.Path(_OUT.value)
    result = train_one_step(pathlib.Path(_MODEL.value), memory)
    memory.look()
    memory.stop()
    result["peak_mb"] = max(row["all_mb"] for row in memory.rows)
    result["peak_by_phase_mb"] = {
        phase: max(row["all_mb"] for row in memory.rows if row["phase"] == phase)
        for phase in dict.fromkeys(row["phase"] for row in memory.rows)
    }
    out.mkdir(parents=True, exist_ok=True)
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, memory.rows[0].keys())
        writer.writeheader()
        writer.writerows(memory.rows)
    tensor_files.write_json(out / "results.json", result)
    plot(memory.rows, result, out / "results.png")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    app.run(main)
