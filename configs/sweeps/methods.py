"""Every method at five learning rates around its own, with three seeds: 210 runs, 14 programs.

    lorax-ft sweep --config=configs/trec.py:lora --sweep=configs/sweeps/methods.py:accuracy \
        --config.data.split.validation=0.1

The argument is the metric to choose by. `loss` is for a language model: of it less is better, it
has no head to train alone, and biases of linear layers are added where it has none. A number after
a comma scales all rates, since small models like larger ones.
"""

from lorax_ft.sweeps import SweepConfig, grid, method, product

METHODS = {  # what a run changes, and the middle of its learning rates
    "full": (method("full"), 1e-4),
    "top_layers": ({**method("top_layers", count=1), "model.compute.scan_layers": False}, 5e-4),
    "head": (method("head"), 1e-2),
    "lora": (method("lora", rank=8), 1e-3),
    "qlora": ({**method("lora", rank=8), "quantization": {"kind": "nf4"}}, 1e-3),
    "adalora": (method("adalora"), 2e-3),
    "vera": (method("vera"), 1e-2),
    "ia3": (method("ia3"), 1e-2),
    "houlsby": (method("adapters", size=32), 1e-3),
    "prefix": (method("prefix", length=10), 1e-2),
    "prompt": (method("prompt", length=10), 1e-2),
    "p_tuning": (method("p_tuning", length=10), 2e-3),
    "bitfit": (method("bitfit"), 2e-3),
    "norms": (method("norms"), 5e-3),
}
FACTORS = (1 / 4, 1 / 2, 1, 2, 4)
SEEDS = (0, 1, 2)


def get_sweep(argument: str = "accuracy") -> SweepConfig:
    metric, _, scale = argument.partition(",")
    methods = dict(METHODS)
    if metric == "loss":
        del methods["head"]
        methods["bitfit"] = (method("bitfit", add_missing=True), 2e-3)
    runs = []
    for changes, rate in methods.values():
        rates = [rate * factor * float(scale or 1) for factor in FACTORS]
        runs += product([changes], grid({"optimizer.learning_rate": rates, "seed": SEEDS}))
    return SweepConfig(
        runs=runs, metric=f"validation.{metric}", mode="min" if metric == "loss" else "max"
    )
