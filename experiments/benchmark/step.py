"""Times one training step on random weights and prints a JSON object: one framework, one process.

    python experiments/benchmark/step.py --model=minilm --method=lora --targets=all-linear

Shapes, batches and targets are those of BERT-base, MiniLM-L6 and a LLaMA of 110 M parameters with
AdamW, in float32. `tokens_per_s` is batch * length over the median step; `peak_rss_mb` is of the
whole process, `steps_peak_rss_mb` of the timed steps. `gflop` is the arithmetic of a step's matrix
products, and `product_gflops` what this machine reaches in large ones, a second: their ratio is the
least time that a step could take.
"""

from __future__ import annotations

import json
import resource
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from lorax_ft import inspection, memory, methods, training, trees
from lorax_ft.lift import lift
from lorax_ft.models import BertConfig, LlamaConfig, build
from lorax_ft.quantization import QuantizationConfig, quantize
from lorax_ft.training import flops

MODELS = {
    "bert": BertConfig(),
    "minilm": BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
    "llama": LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        intermediate_size=2048,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
}
QUERY_VALUE = ("query", "value")

_MODEL = flags.DEFINE_enum("model", "minilm", list(MODELS), "shapes")
_METHOD = flags.DEFINE_enum("method", "lora", ["full", "lora", "qlora"], "what is trained")
_TARGETS = flags.DEFINE_enum("targets", "default", ["default", "all-linear"], "LoRA's; q, v or all")
_BATCH = flags.DEFINE_integer("batch", 4, "rows")
_LENGTH = flags.DEFINE_integer("length", 128, "tokens a row")
_STEPS = flags.DEFINE_integer("steps", 6, "timed steps")
_REMAT = flags.DEFINE_enum("remat", "none", ["none", "full"], "what is computed again")
_SCAN = flags.DEFINE_bool("scan_layers", False, "one compiled layer, looped, or each on its own")


def make_step():
    """(step, its arguments but the key, trainable parameters)."""
    is_llama = _MODEL.value == "llama"
    task = "causal_lm" if is_llama else "sequence_classification"
    how = {"scan_layers": _SCAN.value, "remat": _REMAT.value}
    model = build(MODELS[_MODEL.value], task=task, **how)
    params = model.init(jax.random.key(0))
    batch = make_batch(model.config.vocab_size, is_llama)
    uses = inspection.inspect(model.apply, params, {"input_ids": batch["input_ids"]})
    if _METHOD.value == "qlora":
        params = quantize(params, QuantizationConfig(), uses)
    config = methods.FullConfig()
    if _METHOD.value != "full":
        targets = QUERY_VALUE if _TARGETS.value == "default" else "all-linear"
        head = () if is_llama else ("classifier",)
        config = methods.LoraConfig(targets=targets, rank=8, modules_to_save=head)
    params, trainable = methods.add_methods(params, [config], jax.random.key(1), uses)
    train, frozen = trees.partition(params, trainable)
    optimizer = training.OptimizerConfig(
        learning_rate=1e-4, weight_decay=0.01, schedule="constant", clip_norm=None
    )
    tx = training.build_optimizer(optimizer, total_steps=1000)
    apply = lift(model.outputs)
    step = training.make_train_step(
        lambda params, inputs, key: apply(params, inputs), training.OBJECTIVES[task], tx
    )
    count = trees.count(params, trainable).trainable
    return step, (train, tx.init(train), frozen, batch), count


def make_batch(vocabulary: int, is_llama: bool) -> dict[str, jax.Array]:
    random = np.random.default_rng(1)
    ids = random.integers(5, vocabulary, (_BATCH.value, _LENGTH.value)).astype(np.int32)
    labels = ids if is_llama else random.integers(0, 2, _BATCH.value).astype(np.int32)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels}
    return {name: jnp.asarray(array) for name, array in batch.items()}


def product_gflops(size: int = 2048, count: int = 10) -> float:
    """The rate of the fastest of some square float32 products."""
    product = jax.jit(jnp.matmul)
    x = jax.random.normal(jax.random.key(3), (size, size))
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


def reset_peak() -> None:
    """Starts the kernel's mark of this process's largest memory anew, where that can be done."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def peak_mb() -> float:
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(argv: list[str]) -> None:
    step, (train, opt_state, frozen, batch), trainable = make_step()
    key = jax.random.key(2)
    start = time.perf_counter()
    memory.check_step(step, (train, opt_state, frozen, batch, key))  # compiles, as `train` does
    compile_s = time.perf_counter() - start
    times, losses = [], []
    for number in range(_STEPS.value + 2):  # two to warm up
        if number == 2:
            reset_peak()
        start = time.perf_counter()
        train, opt_state, metrics = step(train, opt_state, frozen, batch, key)
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - start)
    median, peak = statistics.median(times[2:]), peak_mb()
    traced = step.trace(train, opt_state, frozen, batch, key)
    result = {
        "model": _MODEL.value,
        "method": _METHOD.value,
        "targets": _TARGETS.value,
        "trainable_params": trainable,
        "step_ms_median": round(median * 1e3, 1),
        "step_ms_min": round(min(times[2:]) * 1e3, 1),
        "tokens_per_s": round(_BATCH.value * _LENGTH.value / median, 1),
        "compile_s": round(compile_s, 1),
        "steps_peak_rss_mb": round(peak, 1),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "gflop": round(flops.count_flops(traced.jaxpr) / 1e9, 1),
        "product_gflops": round(product_gflops(), 1),
        "losses": [round(loss, 5) for loss in losses],
        "jax": jax.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
