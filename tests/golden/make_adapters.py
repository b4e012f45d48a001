"""Makes adapters/: PEFT's combinations of several tiny adapters, and its allocation of ranks.

Run with torch 2.13 (CPU) and peft 0.21.2, which the project itself does not need:

    python tests/golden/make_adapters.py

combinations.npz: `<adapter>.<module>.A` and `.B` are factors as PEFT keeps them, `<adapter>.scale`
their scale; `<case>.<module>` is the update `[out, in]` (of an embedding `[rows, d]`) of the
combined adapter, `<case>.<module>.A` its first factor where that is the same in every SVD.
allocation.npz: for each step the parameters and gradients given to AdaLoRA's allocator, the budget
and the singular values after it.
"""

import itertools
import pathlib

import numpy as np
import peft
import torch

OUT = pathlib.Path(__file__).parent / "adapters"
MODULES = ("embedding", "query", "value")
WEIGHTS = (0.7, -0.4, 1.3)
ADAPTERS = {"one": (3, 6.0), "two": (3, 3.0), "three": (3, 1.5), "wide": (4, 8.0), "low": (1, 2.0)}
EQUAL, MIXED = ("one", "two", "three"), ("one", "wide", "low")
PRUNED = {"density": 0.55}
CASES = {
    "linear": (EQUAL, {"combination_type": "linear"}),
    "cat": (MIXED, {"combination_type": "cat"}),
    "svd": (MIXED, {"combination_type": "svd"}),
    "svd_rank_2": (MIXED, {"combination_type": "svd", "svd_rank": 2}),
    **{
        name: (EQUAL, {"combination_type": name, **PRUNED})
        for name in ("ties", "dare_linear", "dare_ties", "magnitude_prune")
    },
    **{
        name: (MIXED, {"combination_type": name, **PRUNED})
        for name in ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
    },
    "ties_frequency": (
        EQUAL,
        {"combination_type": "ties", "majority_sign_method": "frequency", **PRUNED},
    ),
}


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 6)
        self.query = torch.nn.Linear(6, 5, bias=False)
        self.value = torch.nn.Linear(5, 6, bias=False)

    def forward(self, ids):
        return self.value(self.query(self.embedding(ids)))


def kept(number: int, density: float, shape: tuple[int, ...]) -> np.ndarray:
    """The mask that stands for chance: of adapter `number`, the same for a matrix and its
    transpose."""
    i, j = np.indices(shape)
    return (7 * (i + j) + 3 * i * j + 5 * number) % 10 < 10 * density


def factors(model: torch.nn.Module, module: str, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    layer = getattr(model.base_model.model, module)
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]


def combinations() -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    arrays, model = {}, None
    for name, (rank, alpha) in ADAPTERS.items():
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(MODULES))
        if model is None:
            model = peft.get_peft_model(Tiny(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        arrays[f"{name}.scale"] = np.float32(alpha / rank)
        for module in MODULES:
            for part, factor in zip("AB", factors(model, module, name)):
                factor.data = torch.randn(factor.shape)
                arrays[f"{name}.{module}.{part}"] = factor.detach().numpy().copy()
    for case, (adapters, options) in CASES.items():
        calls = itertools.count()
        torch.bernoulli = lambda p, calls=calls: torch.tensor(
            kept(next(calls) % 3, float(p.reshape(-1)[0]), tuple(p.shape)), dtype=p.dtype
        )
        model.base_model.add_weighted_adapter(list(adapters), list(WEIGHTS), case, **options)
        for module in MODULES:
            layer = getattr(model.base_model.model, module)
            arrays[f"{case}.{module}"] = layer.get_delta_weight(case).detach().numpy()
            if not options["combination_type"].endswith("svd"):
                a, _ = factors(model, module, case)
                arrays[f"{case}.{module}.A"] = a.detach().numpy()
    return arrays


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 6)
        self.second = torch.nn.Linear(6, 6)
        self.out = torch.nn.Linear(6, 5)

    def forward(self, x):
        return self.out(self.second(self.first(x)))


def allocation() -> dict[str, np.ndarray]:
    torch.manual_seed(1)
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=2,
        tfinal=3,
        total_step=14,
        deltaT=2,
        beta1=0.8,
        beta2=0.7,
        target_modules=["first", "second", "out"],
    )
    model = peft.get_peft_model(Layers(), config)
    parameters = {
        f"{module}.{part}": getattr(getattr(model.base_model.model, module), f"lora_{part}")[
            "default"
        ]
        for module in ("first", "second", "out")
        for part in "AEB"
    }
    arrays = {}
    for step in range(config.total_step):
        for name, parameter in parameters.items():
            parameter.data += 0.1 * torch.randn(parameter.shape)
            parameter.grad = torch.randn(parameter.shape)
            arrays[f"{step}.{name}"] = parameter.detach().numpy().copy()
            arrays[f"{step}.{name}.gradient"] = parameter.grad.numpy().copy()
        arrays[f"{step}.budget"] = np.int32(model.base_model.rankallocator.budget_schedule(step)[0])
        model.base_model.update_and_allocate(step)
        for module in ("first", "second", "out"):
            arrays[f"{step}.{module}.after"] = parameters[f"{module}.E"].detach().numpy().copy()
    return arrays


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    np.savez_compressed(OUT / "combinations.npz", **combinations())
    np.savez_compressed(OUT / "allocation.npz", **allocation())
