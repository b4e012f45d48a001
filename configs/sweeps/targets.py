"""LoRA on queries and values alone, as in its paper, and on all linear layers.

    lorax-ft sweep --config=configs/trec.py:lora --sweep=configs/sweeps/targets.py \
        --config.data.split.validation=0.1

Two ranks and five learning rates, with three seeds: 60 runs, two programs. Arguments are those of
ranks.py: `targets.py:loss,scale=8`.
"""

from lorax_ft.sweeps import SweepConfig, grid


def get_sweep(metric: str = "accuracy", scale: float = 1, seeds: int = 3) -> SweepConfig:
    rates = [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]
    return SweepConfig(
        runs=grid(
            {
                "lora.targets": [("query", "value"), "all-linear"],
                "lora.rank": [4, 16],
                "optimizer.learning_rate": [rate * scale for rate in rates],
                "seed": range(seeds),
            }
        ),
        metric=f"validation.{metric}",
    )
