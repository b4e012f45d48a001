"""Four ranks of LoRA times two learning rates: eight runs, one program.

    lorax-ft sweep --config=configs/trec.py:lora --sweep=configs/sweeps/rank_and_rate.py \
        --config.data.split.validation=0.1
"""

from lorax_ft.sweeps import SweepConfig, grid


def get_sweep() -> SweepConfig:
    return SweepConfig(
        runs=grid({"lora.rank": [1, 4, 16, 64], "optimizer.learning_rate": [5e-4, 2e-3]})
    )
