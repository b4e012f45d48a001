"""Ranks of LoRA from 1 to 64 times five learning rates, with three seeds: 105 runs, one program.

    lorax-ft sweep --config=configs/trec.py:lora --sweep=configs/sweeps/ranks.py \
        --config.data.split.validation=0.1

The argument is another number of seeds: `ranks.py:1` are 35 runs.
"""

from lorax_ft.sweeps import SweepConfig, grid


def get_sweep(seeds: str = "3") -> SweepConfig:
    return SweepConfig(
        runs=grid(
            {
                "lora.rank": [1, 2, 4, 8, 16, 32, 64],
                "optimizer.learning_rate": [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3],
                "seed": range(int(seeds)),
            }
        )
    )
