"""Every method at five learning rates around its own, with three seeds: 210 runs, 14 programs.

    lorax-ft sweep --config=configs/trec.py:lora --sweep=configs/sweeps/methods.py:accuracy \
        --config.data.split.validation=0.1

The arguments are the metric to choose by and what is to be otherwise, as in
`matthews,rates=3,methods=lora+ia3` or `loss,scale=4`, a factor of all rates, since small models
like larger ones. `loss` is for a language model: of it less is better, it has no head to train
alone, and biases of linear layers are added where it has none. `methods=classic` are the eight that
papers compare: full, lora, qlora, houlsby, prefix, prompt, bitfit and ia3.
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
CLASSIC = "full+lora+qlora+houlsby+prefix+prompt+bitfit+ia3"
FACTORS = {3: (1 / 3, 1, 3), 5: (1 / 4, 1 / 2, 1, 2, 4)}  # of the middle rate, by their number
SEEDS = (0, 1, 2)


def get_sweep(
    metric: str = "accuracy", rates: int = 5, scale: float = 1, methods: str = "+".join(METHODS)
) -> SweepConfig:
    names = (CLASSIC if methods == "classic" else methods).split("+")
    if rates not in FACTORS or not set(names) <= set(METHODS):
        raise ValueError(
            f"methods.py: got rates={rates} and methods={methods}; expected rates of "
            f"{tuple(FACTORS)} and methods of {', '.join(METHODS)}."
        )
    known = dict(METHODS)
    if metric == "loss":
        names = [name for name in names if name != "head"]
        known["bitfit"] = (method("bitfit", add_missing=True), 2e-3)
    runs = []
    for changes, rate in (known[name] for name in names):
        values = [rate * factor * scale for factor in FACTORS[rates]]
        runs += product([changes], grid({"optimizer.learning_rate": values, "seed": SEEDS}))
    return SweepConfig(runs=runs, metric=f"validation.{metric}")
