"""The table of methods, and their composition."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lorax_ft import trees
from lorax_ft.methods import adalora, adapters, added_bias, ia3, lora, prompts, selection, vera
from lorax_ft.methods.targets import Uses, modules
from lorax_ft.quantization import QuantizationConfig


@dataclasses.dataclass(frozen=True)
class Method:
    """How a method rewrites parameters, and which of the model's own arrays it trains besides its
    leaves."""

    config: type
    add: (
        Callable[..., Any] | None
    )  # (params, config, key, uses, quantization) -> params; None: adds nothing
    trained: Callable[[Any, Any, Uses], list[str]] | None = (
        None  # (params, config, uses) -> paths of plain arrays to train; None: leaves alone
    )


METHODS = {
    "lora": Method(lora.LoraConfig, lora.add_lora, lora.trained_biases),
    "adalora": Method(adalora.AdaLoraConfig, adalora.add_adalora),
    "vera": Method(vera.VeraConfig, vera.add_vera),
    "ia3": Method(ia3.IA3Config, ia3.add_ia3),
    "adapters": Method(adapters.AdapterConfig, adapters.add_adapters, adapters.trained_norms),
    "prompt": Method(prompts.PromptConfig, prompts.add_prompt, prompts.prompt_arrays),
    "p_tuning": Method(prompts.PTuningConfig, prompts.add_p_tuning, prompts.prompt_arrays),
    "prefix": Method(prompts.PrefixConfig, prompts.add_prefix, prompts.prefix_arrays),
    "bitfit": Method(selection.BitFitConfig, added_bias.add_biases, selection.biases),
    "norms": Method(selection.NormConfig, None, selection.norm_arrays),
    "top_layers": Method(selection.TopLayersConfig, None, selection.top_layers),
    "head": Method(selection.HeadConfig, None, selection.head),
    "full": Method(selection.FullConfig, None, selection.all_arrays),
}


def add_methods(
    params: Any,
    configs: Sequence[Any],
    key: jax.Array,
    uses: Uses = None,
    quantization: QuantizationConfig | None = None,
) -> tuple[Any, tuple[str, ...]]:
    """Applies methods one after another, each with its own fold of the key.

    A config's `modules_to_save`, where it has them, are trained whole beside. Returns the params
    and the patterns of plain arrays to train, as `trees.partition` takes them. Raises ValueError
    for a config that belongs to no method.
    """
    trained: dict[str, None] = {}
    for number, config in enumerate(configs):
        method = _method_of(config)
        if method.add is not None:
            params = method.add(params, config, jax.random.fold_in(key, number), uses, quantization)
        saved = getattr(config, "modules_to_save", ())
        field = f"{type(config).__name__}.modules_to_save"
        chosen = set(modules(trees.flatten(params), saved, field=field))
        if method.trained is not None:
            chosen.update(method.trained(params, config, uses))
        trained.update(dict.fromkeys(path for path in trees.flatten(params) if path in chosen))
    return params, tuple(re.escape(path) for path in trained)


def _method_of(config: Any) -> Method:
    for method in METHODS.values():
        if isinstance(config, method.config):
            return method
    known = ", ".join(f"{name} ({method.config.__name__})" for name, method in METHODS.items())
    raise ValueError(
        f"add_methods: {type(config).__name__} is the config of no method. Known: {known}."
    )
