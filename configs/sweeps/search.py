"""A search of 32 runs for rank, scale and rate, the poor ones ended early. Needs Optuna.

    pip install 'lorax_ft[search]'
    lorax-ft sweep --config=configs/trec.py:lora --sweep=configs/sweeps/search.py \
        --config.data.split.validation=0.1
"""

from lorax_ft.sweeps import Search, SweepConfig, choice, log_uniform


def get_sweep(sampler: str = "tpe") -> SweepConfig:
    space = {
        "lora.rank": choice(2, 4, 8, 16),
        "lora.alpha": choice(8.0, 16.0, 32.0),
        "optimizer.learning_rate": log_uniform(1e-4, 1e-2),
        "optimizer.warmup_fraction": choice(0.0, 0.06),
    }
    return SweepConfig(
        search=Search(space=space, trials=32, sampler=sampler, pruner="halving"), slots=8
    )
