"""A method at several learning rates, each with three seeds; the argument lists the rates.

    lorax-ft sweep --config=configs/trec.py:lora \
        --sweep=configs/sweeps/rates_and_seeds.py:accuracy,5e-4,1e-3,2e-3 \
        --config.data.split.validation=0.1
"""

from lorax_ft.sweeps import SweepConfig, grid


def get_sweep(argument: str) -> SweepConfig:
    metric, *rates = argument.split(",")
    return SweepConfig(
        runs=grid({"optimizer.learning_rate": [float(r) for r in rates], "seed": [0, 1, 2]}),
        metric=f"validation.{metric}",
        mode="min" if metric == "loss" else "max",
    )
