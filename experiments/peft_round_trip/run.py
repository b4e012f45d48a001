"""Everything that is exported, loaded in transformers, PEFT and bitsandbytes: the same logits?

    python experiments/peft_round_trip/run.py --peer_python=PEER/bin/python

Tiny random models of every family, every method on them with random numbers in what it trains.
Here they are written and their logits computed; `peer.py` reads them in the other Python, which
has torch, transformers, peft and bitsandbytes. Writes results.md beside this file, and exits with
1 where a case is neither equal nor one that PEFT refuses (`REFUSED`).
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from lorax_ft import trees
from lorax_ft.inspection import inspect
from lorax_ft.interop import save_peft
from lorax_ft.lift import lift
from lorax_ft.methods import (
    DoRA,
    IA3Config,
    LoRA,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    add_methods,
    merge,
    set_dropout_key,
)
from lorax_ft.models import BertConfig, Gpt2Config, LlamaConfig, Model, T5Config, build, hub
from lorax_ft.quantization import QuantizationConfig, quantize

HERE = pathlib.Path(__file__).resolve().parent
ATOL = 1e-4  # of logits up to some tens: float32 sums in another order

_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
_BERT = {**_SIZES, "intermediate_size": 128, "max_position_embeddings": 32}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "pad_token_id": 0}
_T5 = {**_SIZES, "intermediate_size": 128, "head_dim": 16, "num_decoder_layers": 3}
CLASSIFICATION, LANGUAGE = "sequence_classification", "causal_lm"
SEQ2SEQ = "seq2seq_lm"
FAMILIES: dict[str, tuple[Any, str]] = {
    "bert": (BertConfig(**_BERT, pad_token_id=0), CLASSIFICATION),
    "roberta": (
        BertConfig.from_hugging_face({"model_type": "roberta", **_BERT, "pad_token_id": 1}),
        CLASSIFICATION,
    ),
    "distilbert": (
        BertConfig.from_hugging_face(
            {
                "model_type": "distilbert",
                "dim": 64,
                "n_layers": 2,
                "n_heads": 4,
                "hidden_dim": 128,
                "vocab_size": 96,
                "max_position_embeddings": 32,
            }
        ),
        CLASSIFICATION,
    ),
    "gpt2": (Gpt2Config(**_SIZES, max_position_embeddings=32, pad_token_id=0), LANGUAGE),
    **{
        family: (LlamaConfig.from_hugging_face({"model_type": family, **_LLAMA}), LANGUAGE)
        for family in ("llama", "mistral", "qwen2")
    },
    **{
        family: (
            LlamaConfig.from_hugging_face({"model_type": family, **_LLAMA, "head_dim": 16}),
            LANGUAGE,
        )
        for family in ("qwen3", "gemma", "gemma2")
    },
    "llama_classifier": (
        LlamaConfig.from_hugging_face({"model_type": "llama", **_LLAMA}),
        CLASSIFICATION,
    ),
    "t5": (T5Config(**_T5), SEQ2SEQ),
    "t5_gated": (
        T5Config(
            **_T5,
            is_gated=True,
            hidden_act="gelu_new",
            tie_word_embeddings=False,
            scale_decoder_outputs=False,
            initializer_factor=0.1,  # products are not scaled: larger ones make errors grow
        ),
        SEQ2SEQ,
    ),
}
LAYERS = r"(.*/)?layers/.*kernel"
METHODS: dict[str, Any] = {
    "lora": LoraConfig(targets=LAYERS, rank=4),
    "dora": LoraConfig(targets=LAYERS, rank=4, dora=True),
    "rslora": LoraConfig(targets=LAYERS, rank=4, alpha=8.0, rslora=True),  # scaled as the others
    "patterns": LoraConfig(
        targets=LAYERS,
        rank=4,
        rank_pattern={r".*layers_1/.*": 2},
        alpha_pattern={r".*/(query|qkv)/kernel": 5.0},
    ),
    "layers": LoraConfig(targets=LAYERS, rank=4, layers=(1,)),
    "biases": LoraConfig(targets=LAYERS, rank=4, bias="lora_only"),
    "embedding": LoraConfig(rank=4, targets=r"embeddings/word/embedding|.*/output/kernel"),
    "head": LoraConfig(targets=LAYERS, rank=4, modules_to_save=("HEAD",)),
    "ia3": IA3Config(),
    "prompt": PromptConfig(length=5),
    "p_tuning": PTuningConfig(length=5),
    "prefix": PrefixConfig(length=5),
    "prefix_net": PrefixConfig(length=5, projection=24),
}
MERGED = ("lora", "dora", "ia3")

# What PEFT cannot load or compute, and why.
_NO_PAST = "this version of transformers gives no classification of it keys and values from before"
REFUSED = {
    f"{family}/{method}": _NO_PAST
    for family in ("bert", "roberta", "distilbert")
    for method in ("prefix", "prefix_net")
}

_PEER_PYTHON = flags.DEFINE_string("peer_python", None, "Python with torch, peft and the rest")
_FAMILIES = flags.DEFINE_list("families", list(FAMILIES), "which models")


def configs_of(family: str, model: Model, params: Any) -> dict[str, Any]:
    """The methods that a family has, by name."""
    paths = set(trees.flatten(params))
    configs = dict(METHODS)
    if not any(path.endswith(("query/bias", "qkv/bias")) for path in paths):
        del configs["biases"]
    owners = {path.partition("/")[0] for path in paths}
    head = next((name for name in ("classifier", "score", "lm_head") if name in owners), None)
    if head is None:
        # The head is the word vectors: PEFT's sees an adapter on them only once it is merged.
        del configs["head"], configs["embedding"]
    else:
        configs["head"] = LoraConfig(targets=LAYERS, rank=4, modules_to_save=(head,))
    if "layers/attention/qkv/kernel" in paths:
        configs["ia3"] = IA3Config(outputs=("qkv",))
    if family == "llama_classifier":
        # With vectors before them PEFT gives no ids, and transformers takes the last position.
        for name in ("prompt", "p_tuning", "prefix", "prefix_net"):
            del configs[name]
    if model.task == SEQ2SEQ:
        # PEFT's prefixes of it are not ours; those that it can compute are tested one by one.
        # It computes no adapter on its word vectors, so that none is exported.
        for name in ("prefix", "prefix_net", "embedding"):
            configs.pop(name, None)
    return configs


def write(folder: pathlib.Path, families: Iterable[str], methods: Iterable[str]) -> None:
    """Writes bases, adapters, merged and four-bit models, logits, and cases.json."""
    cases: list[dict[str, Any]] = []
    for family in families:
        config, task = FAMILIES[family]
        model = build(config, task=task)
        base = _noisy(model.init(jax.random.key(0)), jax.random.key(1), 0.05)
        hub.save(folder / family, model, base)
        cases.append(_case(folder, model, base, f"{family}/base", "base", family))
        names = ["input_ids"] + ["decoder_input_ids"] * (task == SEQ2SEQ)
        batch = {name: jax.ShapeDtypeStruct((1, 8), jnp.int32) for name in names}
        uses = inspect(model.apply, base, batch)
        for method, section in configs_of(family, model, base).items():
            if method not in methods:
                continue
            params, trained = add_methods(base, [section], jax.random.key(2), uses)
            train, frozen = trees.partition(params, trained)
            params = trees.combine(_noisy(train, jax.random.key(3), 0.1), frozen)
            params = trees.map_with_path(_without_padding, params)
            adapter = f"{family}.{method}"
            rslora = bool(getattr(section, "rslora", False))
            save_peft(folder / adapter, model, params, trained, base_name=family, rslora=rslora)
            name = f"{family}/{method}"
            cases.append(_case(folder, model, params, name, "adapter", family, adapter))
            if method in MERGED:
                merged = merge(params)
                hub.save(folder / f"{adapter}.merged", model, merged)
                where = f"{adapter}.merged"
                cases.append(_case(folder, model, merged, f"{name} merged", "merged", where))
        exclude = [QuantizationConfig().exclude, *[r".*/down/kernel"] * (task == SEQ2SEQ)]
        held = quantize(base, QuantizationConfig(exclude=tuple(exclude)))
        hub.save(folder / f"{family}.nf4", model, held)
        cases.append(_case(folder, model, held, f"{family}/nf4", "four_bit", f"{family}.nf4"))
    (folder / "cases.json").write_text(json.dumps(cases))


def _noisy(tree: Any, key: jax.Array, size: float) -> Any:
    """The tree with noise on every array, so that none is at its start."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    noisy = [x + size * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys)]
    return jax.tree.unflatten(structure, noisy)


def _without_padding(path: str, value: Any) -> Any:
    """A LoRA leaf whose rows beyond a layer's rank are zero again, as training leaves them."""
    if isinstance(value, DoRA):
        return value.replace(base=_without_padding(path, value.base))
    if not isinstance(value, LoRA):
        return value
    real = (jnp.arange(value.a.shape[-2]) < value.rank[..., None])[..., None]
    return value.replace(a=jnp.where(real, value.a, 0.0), b=jnp.where(real, value.b, 0.0))


def _case(
    folder: pathlib.Path,
    model: Model,
    params: Any,
    name: str,
    kind: str,
    where: str,
    adapter: str | None = None,
) -> dict[str, Any]:
    """An entry of cases.json; its logits are written."""
    random = np.random.default_rng(0)
    batch = _texts(model, random, "")
    if model.task == SEQ2SEQ:
        batch |= _texts(model, random, "decoder_")
    logits = jax.jit(lift(model.apply))(set_dropout_key(params, None), batch)
    path = folder / f"{name}.npz"
    np.savez(path, **batch, logits=np.asarray(logits))
    return {"name": name, "kind": kind, "task": model.task, "model": where, "adapter": adapter}


def _texts(model: Model, random: np.random.Generator, prefix: str) -> dict[str, np.ndarray]:
    """Three texts of several lengths, padded on the right."""
    ids = random.integers(4, model.config.vocab_size, (3, 9)).astype(np.int32)
    mask = np.ones_like(ids)
    for row, length in ((1, 6), (2, 3)):
        ids[row, length:], mask[row, length:] = model.config.pad_token_id or 0, 0
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}


def ask(python: str, folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What `peer.py` finds in another Python."""
    environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [python, str(HERE / "peer.py"), str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.strip().splitlines()[-1])


def verdict(name: str, found: dict[str, Any]) -> str:
    """`equal`, `refused` or `DIFFERS`."""
    if name in REFUSED and "error" in found:
        return "refused"
    return "equal" if found.get("difference", np.inf) <= ATOL else "DIFFERS"


def table(found: dict[str, dict[str, Any]]) -> str:
    """Families by cases: the largest difference of a logit."""
    families = list(dict.fromkeys(name.split("/")[0] for name in found))
    cases = list(dict.fromkeys(name.split("/")[1] for name in found))
    rows = [("", *families), ("---", *("---:" for _ in families))]
    for case in cases:
        row = [case]
        for family in families:
            name = f"{family}/{case}"
            result = found.get(name)
            if result is None:
                row.append("")
            elif verdict(name, result) == "equal":
                row.append(f"{result['difference']:.0e}")
            else:
                row.append(verdict(name, result))
        rows.append(tuple(row))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(argv: list[str]) -> None:
    del argv
    with tempfile.TemporaryDirectory() as directory:
        folder = pathlib.Path(directory)
        for family in _FAMILIES.value:
            (folder / family).mkdir(parents=True, exist_ok=True)
        write(folder, _FAMILIES.value, METHODS)
        found = ask(_PEER_PYTHON.value or sys.executable, folder)
    text = table(found)
    print(text)
    wrong = {name: r for name, r in found.items() if verdict(name, r) == "DIFFERS"}
    for name, result in wrong.items():
        print(f"{name}: {result.get('error') or result}")
    weights = sum(result.get("weights", 0) for result in found.values())
    largest = max(r["largest"] for r in found.values() if "largest" in r)
    summary = (
        f"{len(found)} cases, {len(found) - len(wrong)} as expected. Largest difference of a logit "
        f"at a token; the logits themselves go up to {largest:.1f}. {weights} four-bit weights "
        "have the same codes, absmax and nested absmax in bitsandbytes.\n\n"
    )
    refused = "".join(
        f"\n- {name}: {why}" for name, why in REFUSED.items() if "error" in found.get(name, {})
    )
    (HERE / "results.md").write_text(
        f"{summary}{text}\n" + (f"\nRefused:\n{refused}\n" if refused else "")
    )
    sys.exit(int(bool(wrong)))


if __name__ == "__main__":
    app.run(main)
