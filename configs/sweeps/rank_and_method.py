"""Ranks of LoRA beside other methods, each at two learning rates: ten runs, three programs.

    lorax-ft sweep --config=configs/quickstart.py --sweep=configs/sweeps/rank_and_method.py \
        --config.train.epochs=3 --config.data.split.validation=0.1
"""

from lorax_ft.sweeps import SweepConfig, grid, method, product


def get_sweep() -> SweepConfig:
    ranks = grid({"lora.rank": [1, 4, 16], "optimizer.learning_rate": [1e-3, 4e-3]})
    others = product(
        [method("ia3"), method("bitfit")], grid({"optimizer.learning_rate": [2e-3, 1e-2]})
    )
    return SweepConfig(runs=[*ranks, *others])
