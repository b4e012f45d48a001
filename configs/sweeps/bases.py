"""What the base under LoRA is stored in: full precision, NF4, FP4, Int8, with three seeds.

    lorax-ft sweep --config=configs/trec.py:lora --sweep=configs/sweeps/bases.py:accuracy \
        --config.data.split.validation=0.1

18 runs, six programs. The argument is the metric, which may be `loss`.
"""

from lorax_ft.sweeps import SweepConfig, grid, product

BASES = (
    None,
    {"kind": "nf4", "double_quantization": False},
    {"kind": "nf4", "double_quantization": True},
    {"kind": "fp4", "double_quantization": False},
    {"kind": "fp4", "double_quantization": True},
    {"kind": "int8"},
)


def get_sweep(metric: str = "accuracy") -> SweepConfig:
    return SweepConfig(
        runs=product([{"quantization": base} for base in BASES], grid({"seed": [0, 1, 2]})),
        metric=f"validation.{metric}",
    )
