"""Ranks of LoRA from 1 to 64 times five learning rates, with three seeds: 105 runs, one program.

    lorax-ft sweep --config=configs/trec.py:lora --sweep=configs/sweeps/ranks.py \
        --config.data.split.validation=0.1

`ranks.py:seeds=1` are 35 runs. Other arguments are the metric, which may be `loss`, and a factor of
all rates: `ranks.py:loss,scale=8`.
"""

from lorax_ft.sweeps import SweepConfig, grid


def get_sweep(metric: str = "accuracy", scale: float = 1, seeds: int = 3) -> SweepConfig:
    rates = [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]
    return SweepConfig(
        runs=grid(
            {
                "lora.rank": [1, 2, 4, 8, 16, 32, 64],
                "optimizer.learning_rate": [rate * scale for rate in rates],
                "seed": range(seeds),
            }
        ),
        metric=f"validation.{metric}",
    )
