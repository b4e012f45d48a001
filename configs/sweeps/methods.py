"""Every method at five learning rates around its own, with three seeds: 210 runs, 14 programs.

    lorax-ft sweep --config=configs/trec.py:lora --sweep=configs/sweeps/methods.py:accuracy \
        --config.data.split.validation=0.1

The argument is the metric to choose by, and after commas what is to be otherwise:
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


def get_sweep(argument: str = "accuracy") -> SweepConfig:
    metric, *options = argument.split(",")
    given = {"scale": "1", "rates": "5", "methods": "+".join(METHODS)}
    for option in options:
        name, _, value = option.partition("=")
        if name not in given:
            raise ValueError(f"methods.py: {option!r} is none of {', '.join(given)}.")
        given[name] = value
    names = (CLASSIC if given["methods"] == "classic" else given["methods"]).split("+")
    methods = dict(METHODS)
    if metric == "loss":
        names = [name for name in names if name != "head"]
        methods["bitfit"] = (method("bitfit", add_missing=True), 2e-3)
    runs = []
    for changes, rate in (methods[name] for name in names):
        rates = [rate * factor * float(given["scale"]) for factor in FACTORS[int(given["rates"])]]
        runs += product([changes], grid({"optimizer.learning_rate": rates, "seed": SEEDS}))
    return SweepConfig(
        runs=runs, metric=f"validation.{metric}", mode="min" if metric == "loss" else "max"
    )
