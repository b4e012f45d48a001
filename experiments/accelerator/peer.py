"""Times training steps of LoRA or QLoRA by transformers, PEFT and bitsandbytes, on random weights.

    python experiments/accelerator/peer.py --method=lora --variants=checkpointing --output=x.csv

As their trainers would: bfloat16 weights, adapters in float32 under autocast, SDPA attention, fused
AdamW on the adapters, clipping at 1. A variant is `checkpointing` (of each layer, not reentrant) or
`none`, after a colon the rows of its batch where they are not --rows: `none:2`. Quantised kernels
are bitsandbytes' Linear4bit, made layer by layer on the device; norms, embedding and head stay in
bfloat16, which `prepare_model_for_kbit_training` would turn into float32.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any

import peft
import torch
import transformers
from common import (
    GIB,
    LEARNING_RATE,
    MODELS,
    RANK,
    read_config,
    since_begun,
    step_flops,
    timed,
    write_row,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16


def make_model(name: str, quantized: bool) -> Any:
    """The model with its adapters, of random weights on the device."""
    config = transformers.LlamaConfig.from_json_file(MODELS[name] / "config.json")
    config.use_cache = False
    with torch.device(DEVICE):
        model = transformers.LlamaForCausalLM._from_config(
            config, dtype=HALF, attn_implementation="sdpa"
        )
    if quantized:
        quantize(model)
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, lora).train()


def quantize(model: Any) -> None:
    """Puts bitsandbytes' layers in place of the model's linear ones, but for the head."""
    import bitsandbytes as bnb

    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if not isinstance(linear, torch.nn.Linear):
                    continue
                options = {"quant_type": "nf4", "compress_statistics": True}
                packed = bnb.nn.Linear4bit(
                    *(linear.in_features, linear.out_features),
                    bias=False,
                    compute_dtype=HALF,
                    device="meta",
                    **options,
                )
                weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, **options)
                packed.weight = weight.to(DEVICE)
                setattr(block, name, packed)
    model.is_loaded_in_4bit = True  # by which PEFT knows


def measure(arguments: argparse.Namespace, model: Any, variant: str) -> dict[str, Any]:
    """A row of the table."""
    kind, _, rows = variant.partition(":")
    rows, length = int(rows or arguments.rows), arguments.length
    if kind == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    config = read_config(arguments.model)
    torch.manual_seed(1)
    ids = torch.randint(5, config["vocab_size"], (rows, length), device=DEVICE)

    def once() -> float:
        with torch.autocast(DEVICE, dtype=HALF):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    peak_bytes(reset=True)
    start = time.perf_counter()
    once()
    build = time.perf_counter() - start
    times, losses = timed(once, arguments.steps)
    seconds, needed = statistics.median(times), step_flops(config, rows, length)
    return {
        "variant": kind,
        "rows": rows,
        "step_s": seconds,
        "fastest_s": min(times),
        "tokens_per_s": rows * length / seconds,
        "tflop": needed / 1e12,
        "mfu": needed / seconds / arguments.peak if arguments.peak and DEVICE == "cuda" else "",
        "peak_gib": peak_bytes() / GIB if DEVICE == "cuda" else "",
        "build_s": build,
        "losses": f"{losses[0]:.3f} {losses[-1]:.3f}",
    }


def peak_bytes(reset: bool = False) -> int:
    if DEVICE == "cpu":
        return 0
    if reset:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--method", choices=("lora", "qlora"), default="lora")
    parser.add_argument("--model", choices=tuple(MODELS), default="llama-3-8b")
    parser.add_argument("--variants", type=lambda text: text.split(","), default=["checkpointing"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--peak", type=float, default=989e12, help="FLOP/s of the device")
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    model = make_model(arguments.model, arguments.method == "qlora")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    fixed = {
        "part": f"peer_{arguments.method}",
        "by": "transformers + PEFT",
        "model": arguments.model,
        "length": arguments.length,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE,
        "start_s": since_begun(),
        "note": f"{versions}, peft {peft.__version__}",
    }
    for variant in arguments.variants:
        try:
            row = measure(arguments, model, variant)
        except torch.OutOfMemoryError as error:
            kind, _, rows = variant.partition(":")
            row = {"variant": kind, "rows": rows or arguments.rows}
            row["note"] = f"out of memory: {str(error).partition(chr(10))[0][:160]}"
            model.zero_grad(set_to_none=True)
        write_row(arguments.output, fixed | row)


if __name__ == "__main__":
    main()
