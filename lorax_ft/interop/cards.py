"""The model card of an exported adapter: README.md, with the front matter that the hub reads."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PIPELINES = {  # the hub's words for tasks
    "sequence_classification": "text-classification",
    "token_classification": "token-classification",
    "causal_lm": "text-generation",
    "masked_lm": "fill-mask",
    "encoder": "feature-extraction",
}
_METHODS = {
    "LORA": "LoRA",
    "IA3": "IA3",
    "PROMPT_TUNING": "prompt tuning",
    "PREFIX_TUNING": "prefix tuning",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What an adapter's card says beside what its files say themselves."""

    data: str = ""  # what it was trained on
    metrics: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    command: str = ""  # that made it
    notes: str = ""  # Markdown, put at the end


def write_card(
    card: ModelCard, config: Mapping[str, Any], base: Mapping[str, str], task: str | None
) -> str:
    """The text of README.md.

    Args:
        card: what the caller knows of the training.
        config: the fields of adapter_config.json.
        base: `bases.describe` of the base.
        task: what the model is for.
    """
    name = config["base_model_name_or_path"]
    parts = [_front_matter(config, card, task), f"# {_title(config)}", _sentence(config, name)]
    rows = {
        "base": name or "unnamed",
        "fingerprint of the base": base["base_fingerprint"],
        "base held as": base["base_held_as"],
        **_sizes(config),
        "modules saved whole": _listed(config.get("modules_to_save") or ()),
        "data": card.data,
    }
    parts.append(_table(("", ""), [(key, value) for key, value in rows.items() if value]))
    if card.metrics:
        names = list(dict.fromkeys(name for found in card.metrics.values() for name in found))
        rows = [
            (part, *(f"{found[name]:.4f}" if name in found else "" for name in names))
            for part, found in card.metrics.items()
        ]
        parts += ["## Results", _table(("", *names), rows)]
    if card.command:
        parts += ["## Made by", f"```bash\n{card.command}\n```"]
    parts += [_use(name, task), *([card.notes] if card.notes else [])]
    return "\n\n".join(parts) + "\n"


def _front_matter(config: Mapping[str, Any], card: ModelCard, task: str | None) -> str:
    """YAML; the hub takes as `base_model` only what has the form of one of its names."""
    name = config["base_model_name_or_path"]
    is_named = bool(_HUB_NAME.fullmatch(name)) and not pathlib.Path(name).exists()
    tags = ["lorax_ft", config["peft_type"].lower()]
    if is_named:
        tags.insert(0, f"base_model:adapter:{name}")
    lines = [f"base_model: {json.dumps(name)}"] if is_named else []
    lines.append("library_name: peft")
    if task in _PIPELINES:
        lines.append(f"pipeline_tag: {_PIPELINES[task]}")
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    metrics = dict.fromkeys(name for found in card.metrics.values() for name in found)
    if metrics:
        lines += ["metrics:", *(f"- {json.dumps(name)}" for name in metrics)]
    return "\n".join(["---", *lines, "---"])


def _method(config: Mapping[str, Any]) -> str:
    kind = config["peft_type"]
    if kind != "LORA":
        return _METHODS[kind]
    name = "DoRA" if config["use_dora"] else "LoRA"
    return f"{name}, scaled as rsLoRA" if config["use_rslora"] else name


def _title(config: Mapping[str, Any]) -> str:
    name = config["base_model_name_or_path"].rstrip("/").rpartition("/")[2]
    return f"{_method(config)} for {name or 'an unnamed base'}"


def _sentence(config: Mapping[str, Any], name: str) -> str:
    return (
        f"An adapter in the format of Hugging Face PEFT ({_method(config)}), made by lorax_ft. It "
        f"changes the output of {f'`{name}`' if name else 'its base'} and of no other model."
    )


def _sizes(config: Mapping[str, Any]) -> dict[str, str]:
    rows = {"method": _method(config)}
    if "r" in config:
        others = "".join(
            f"; {_listed(f'{key}: {value}' for key, value in config[name].items())}"
            for name in ("rank_pattern", "alpha_pattern")
            if config[name]
        )
        rows["rank, alpha"] = f"{config['r']}, {config['lora_alpha']}{others}"
    if config.get("target_modules"):
        rows["targets"] = _listed(sorted({_last(name) for name in config["target_modules"]}))
    if "num_virtual_tokens" in config:
        rows["virtual tokens"] = str(config["num_virtual_tokens"])
    return rows


def _use(name: str, task: str | None) -> str:
    factory = {
        "sequence_classification": "AutoModelForSequenceClassification",
        "token_classification": "AutoModelForTokenClassification",
        "causal_lm": "AutoModelForCausalLM",
        "masked_lm": "AutoModelForMaskedLM",
    }.get(task or "", "AutoModel")
    base = json.dumps(name or "the base")
    return (
        "## Use\n\n```python\nfrom peft import PeftModel\n"
        f"from transformers import {factory}\n\n"
        f"base = {factory}.from_pretrained({base})\n"
        'model = PeftModel.from_pretrained(base, "this directory")\n```\n\n'
        "```python\nfrom lorax_ft.interop import load_peft\nfrom lorax_ft.models import hub\n\n"
        f"model, base = hub.load({base})\n"
        'params, trained = load_peft("this directory", model, base)\n```'
    )


def _last(name: str) -> str:
    """`query` of `bert.encoder.layer.0.attention.self.query`."""
    return name.rpartition(".")[2]


def _listed(names: Any, limit: int = 12) -> str:
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
