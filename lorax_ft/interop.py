"""Adapters as Hugging Face PEFT directories: `adapter_config.json` and `adapter_model.safetensors`.

LoRA, rsLoRA, DoRA, adapted embeddings, ranks and alphas by pattern, subsets of layers, trained
biases and modules saved whole, for every model whose names are known. Strict both ways: a tensor
that is not read, one that is missing, and a config field that changes the maths and is not handled,
raise.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_ft import trees
from lorax_ft.leaves import Leaf
from lorax_ft.methods.dora import DoRA
from lorax_ft.methods.lora_leaf import LoRA
from lorax_ft.models.hugging_face import SUFFIXES, split_layer
from lorax_ft.models.model import Model, hugging_face_name, module_path
from lorax_ft.models.tensor_files import new_directory

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TASK_TYPES = {
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "causal_lm": "CAUSAL_LM",
    "masked_lm": None,
    "encoder": "FEATURE_EXTRACTION",
}

# Fields of adapter_config.json that are read, or that change nothing once an adapter is trained.
READ = frozenset(
    """
    peft_type r lora_alpha rank_pattern alpha_pattern use_rslora use_dora bias modules_to_save
    target_modules exclude_modules layers_to_transform layers_pattern lora_dropout
    init_lora_weights
    """.split()
)
HARMLESS = frozenset(
    """
    base_model_name_or_path revision task_type peft_version inference_mode auto_mapping
    megatron_core loftq_config qalora_group_size fan_in_fan_out runtime_config
    """.split()
)

_TENSOR = re.compile(
    r"(?P<module>.+?)\.(?:(?P<part>lora_A|lora_B)(?:\.\w+)?\.weight"
    r"|(?P<embedding>lora_embedding_[AB])(?:\.\w+)?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.\w+)?(?:\.weight)?"
    r"|base_layer\.(?P<bias>bias))"
)


# --- Out ------------------------------------------------------------------------------------------


def save_peft(
    directory: str | os.PathLike[str],
    model: Model,
    params: Any,
    trainable: trees.Patterns = (),
    *,
    base_name: str = "",
    dropout: float = 0.0,
    rslora: bool = False,
    card: str = "",
) -> None:
    """Writes the adapters of `params`, and the plain arrays `trainable` names, as a PEFT directory.

    The directory must be new or empty, and appears whole or not at all. `base_name` says which base
    model the adapter belongs to; `rslora` how to state the scale, as alpha over the root of the
    rank; `card` becomes README.md. Raises ValueError where there is nothing to save, and where the
    directory holds something.
    """
    from safetensors.numpy import save_file

    tensors, modules = _adapter_tensors(model, params)
    saved, biases = _plain_tensors(model, params, trainable, set(modules))
    if not tensors and not saved:
        raise ValueError("save_peft: the parameters hold no LoRA leaf and nothing is trainable.")
    config = {
        **_ranks_and_alphas(modules, rslora),
        "base_model_name_or_path": base_name,
        "bias": biases,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": dropout,
        "modules_to_save": sorted(
            {name.rsplit(".", 1)[0] for name in saved if not _is_bias_only(name, biases)}
        )
        or None,
        "peft_type": "LORA",
        "target_modules": sorted(modules),
        "task_type": TASK_TYPES.get(model.task),
        "use_dora": any(isinstance(v, DoRA) for v in trees.flatten(params).values()),
        "use_rslora": rslora,
    }
    everything = {
        PREFIX + name: np.ascontiguousarray(t) for name, t in {**tensors, **saved}.items()
    }
    with new_directory(pathlib.Path(directory)) as new:
        save_file(everything, new / WEIGHTS, metadata={"format": "pt"})
        (new / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if card:
            (new / "README.md").write_text(card)


def _adapter_tensors(
    model: Model, params: Any
) -> tuple[dict[str, Any], dict[str, tuple[int, float]]]:
    """Tensors by PEFT's name, and the (rank, scale) of each adapted module."""
    tensors, modules = {}, {}
    for path, value in trees.flatten(params).items():
        if not isinstance(value, (LoRA, DoRA)):
            _check_no_adapter(path, value)
            continue
        lora = value.base if isinstance(value, DoRA) else value
        for index in np.ndindex(lora.stack_shape):
            rank = int(lora.rank[index])
            if rank == 0:
                continue
            name = hugging_face_name(model, path, *index)
            modules[name] = (rank, float(lora.scale[index]))
            a, b = np.asarray(lora.a[index])[:rank], np.asarray(lora.b[index])[:rank].T
            if path.endswith("/embedding"):
                tensors |= {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
            else:
                tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            if isinstance(value, DoRA):
                tensors[f"{name}.lora_magnitude_vector"] = np.asarray(value.magnitude[index])
    return tensors, modules


def _check_no_adapter(path: str, value: Any) -> None:
    """Raises ValueError for a leaf with trained fields, which would be left out."""
    if isinstance(value, Leaf) and value.trainable_count():
        raise ValueError(
            f"save_peft: {path} is a {trees.kind(value)} leaf, which PEFT's LoRA does not have. "
            "Make it LoRA first: as_lora(params) for AdaLoRA, select(adapters, name) for MixedLoRA."
        )


def _plain_tensors(
    model: Model, params: Any, trainable: trees.Patterns, adapted: set[str]
) -> tuple[dict[str, Any], str]:
    """Trained arrays of the model's own by PEFT's name, and PEFT's word for which biases are among
    them."""
    tensors, biases = {}, "none"
    parameters = trees.flatten(params)
    for path in trees.select(parameters, trainable, field="trainable"):
        depth = 1 if path.startswith("layers/") else 0
        for index in np.ndindex(tuple(parameters[path].shape[:depth])):
            module = hugging_face_name(model, path, *index)
            kind, array = path.rsplit("/", 1)[1], np.asarray(parameters[path][index])
            if module in adapted and kind == "bias":
                tensors[f"{module}.base_layer.bias"] = array
                biases = "lora_only" if biases == "none" else biases
            else:
                tensors[f"{module}.{SUFFIXES[kind]}"] = array.T if kind == "kernel" else array
    lone = _lone_biases(tensors)
    return tensors, "all" if lone else biases


def _lone_biases(tensors: Mapping[str, Any]) -> list[str]:
    """Biases whose module has no other trained tensor: they are no modules saved whole."""
    owners = collections.Counter(name.rsplit(".", 1)[0] for name in tensors)
    return [
        n
        for n in tensors
        if n.endswith(".bias") and owners[n.rsplit(".", 1)[0]] == 1 and ".base_layer." not in n
    ]


def _is_bias_only(name: str, biases: str) -> bool:
    return ".base_layer." in name or (biases == "all" and name.endswith(".bias"))


def _ranks_and_alphas(modules: Mapping[str, tuple[int, float]], rslora: bool) -> dict[str, Any]:
    """The commonest rank and alpha, and patterns for the modules that differ."""
    alphas = {
        name: round(scale * (math.sqrt(rank) if rslora else rank), 5)
        for name, (rank, scale) in modules.items()
    }
    ranks = {name: rank for name, (rank, _) in modules.items()}
    rank = collections.Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    alpha = collections.Counter(alphas.values()).most_common(1)[0][0] if alphas else 8
    return {
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "rank_pattern": {n: r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alpha},
    }


# --- In -------------------------------------------------------------------------------------------


def load_peft(
    directory: str | os.PathLike[str], model: Model, params: Any
) -> tuple[Any, tuple[str, ...]]:
    """Puts the adapter of a PEFT directory into `params`, the base that it was trained on.

    Returns the params and the patterns of the plain arrays that came with it, as `trees.partition`
    takes them. Raises ValueError naming the file and the key for a tensor that is not read or is
    missing, a module the model does not have, a shape that does not fit, and a config field that is
    not handled.
    """
    config, tensors = _read(pathlib.Path(directory))
    adapters, plain = _sorted_tensors(tensors, model, params)
    changes: dict[str, Any] = {}
    for path, layers in adapters.items():
        changes[path] = _leaf(path, trees.flatten(params)[path], layers, model, config)
    for path, pieces in plain.items():
        changes[path] = _filled(path, trees.flatten(params)[path], pieces)
    return trees.with_fields(params, changes), tuple(re.escape(path) for path in plain)


def _read(directory: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from safetensors.numpy import load_file

    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            found = (
                sorted(p.name for p in directory.glob("*"))
                if directory.is_dir()
                else "no directory"
            )
            raise ValueError(f"load_peft: {directory / name} is not there; found {found}.")
    config = json.loads((directory / CONFIG).read_text())
    _check_config(config, directory / CONFIG)
    try:
        tensors = load_file(directory / WEIGHTS)
    except Exception as error:  # the reader has several kinds of error for a broken file
        raise ValueError(f"load_peft: {directory / WEIGHTS} cannot be read ({error}).") from error
    return config, tensors


def _check_config(config: Mapping[str, Any], path: pathlib.Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{path}: peft_type is {config.get('peft_type')!r}; only 'LORA' can be read."
        )
    if (
        not isinstance(config.get("init_lora_weights", True), bool)
        and config["init_lora_weights"] != "gaussian"
    ):
        raise ValueError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changed the "
            "base weights: the adapter does not fit the base as published. Convert it to a plain "
            "LoRA first."
        )
    for name, value in config.items():
        if name not in READ and name not in HARMLESS and value not in (None, False, {}, []):
            raise ValueError(f"{path}: {name} = {value!r} may change the maths and is not handled.")
    missing = {"r", "lora_alpha"} - set(config)
    if missing:
        raise ValueError(f"{path}: {sorted(missing)} is missing.")


Layers = dict[int | None, dict[str, np.ndarray]]


def _sorted_tensors(
    tensors: Mapping[str, np.ndarray], model: Model, params: Any
) -> tuple[dict[str, Layers], dict]:
    """Adapter tensors by our path and layer, and plain tensors by our path and layer."""
    adapters: dict[str, Layers] = collections.defaultdict(lambda: collections.defaultdict(dict))
    plain: dict[str, dict[int | None, np.ndarray]] = collections.defaultdict(dict)
    paths = trees.flatten(params)
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = _TENSOR.fullmatch(name)
        if match and not match["bias"]:
            part = match["part"] or match["embedding"] or match["magnitude"]
            kinds = ("embedding",) if match["embedding"] else ("kernel",)
            path, layer = _our_path(key, match["module"], kinds, model, paths)
            adapters[path][layer][part.removeprefix("lora_").removeprefix("embedding_")] = tensor
        else:
            module, _, suffix = (f"{match['module']}.bias" if match else name).rpartition(".")
            kinds = ("bias",) if suffix == "bias" else ("kernel", "embedding", "scale")
            path, layer = _our_path(
                key, module.removesuffix(".modules_to_save.default"), kinds, model, paths
            )
            plain[path][layer] = tensor.T if path.endswith("/kernel") else tensor
    return adapters, plain


def _our_path(
    key: str, module: str, kinds: tuple[str, ...], model: Model, paths: Mapping[str, Any]
) -> tuple[str, int | None]:
    """The parameter a tensor belongs to, and its layer where ours are stacked."""
    found = module_path(model, module)
    if found is not None:
        ours, layer = found
        for kind in kinds:
            if f"{ours}/{kind}" in paths:
                return f"{ours}/{kind}", layer
            unrolled = f"layers_{layer}/{ours.removeprefix('layers/')}/{kind}"
            if layer is not None and unrolled in paths:
                return unrolled, None
    known = [hugging_face_name(model, p, 0) for p in paths if _is_named(model, p)]
    raise ValueError(
        f"load_peft: the tensor {key!r} belongs to no parameter of this model. Nearest modules: "
        f"{', '.join(trees.nearest(module, dict.fromkeys(known)))}."
    )


def _is_named(model: Model, path: str) -> bool:
    return split_layer(path)[0].rpartition("/")[0] in model.family.tables.NAMES


def _leaf(
    path: str, base: Any, layers: Layers, model: Model, config: Mapping[str, Any]
) -> LoRA | DoRA:
    """One parameter's leaf from the tensors of its layers; layers without an adapter get rank 0."""
    stacked = None not in layers
    count = base.shape[0] if stacked else 1
    wanted = {"A", "B"} | ({"magnitude_vector"} if config.get("use_dora") else set())
    rows: list[_Layer | None] = [None] * count
    for layer, parts in layers.items():
        if set(parts) != wanted:
            raise ValueError(
                f"load_peft: {path}, layer {layer}: found {sorted(parts)}, not {sorted(wanted)}."
            )
        rows[layer or 0] = _layer(path, layer, base, parts, model, config)
    if config.get("use_dora") and None in rows:
        without = [i for i, row in enumerate(rows) if row is None]
        raise ValueError(f"load_peft: {path}: layers {without} have no DoRA.")
    rank = max(row.rank for row in rows if row)
    core = base.shape[1:] if stacked else base.shape
    fields = [row.padded(rank) if row else _empty(rank, *core) for row in rows]
    a, b, scale, ranks = (np.stack(f) if stacked else f[0] for f in zip(*fields))
    lora = LoRA(
        base=base,
        a=jnp.asarray(a),
        b=jnp.asarray(b),
        scale=jnp.asarray(scale, jnp.float32),
        rank=jnp.asarray(ranks, jnp.int32),
        dropout=jnp.full(np.shape(scale), config["lora_dropout"])
        if config.get("lora_dropout")
        else None,
    )
    if not config.get("use_dora"):
        return lora
    magnitudes: list[Any] = [row.magnitude for row in rows if row is not None]
    return DoRA(
        base=lora, magnitude=jnp.asarray(np.stack(magnitudes) if stacked else magnitudes[0])
    )


@dataclasses.dataclass(frozen=True)
class _Layer:
    """The adapter of one layer: a [rank, in], b [rank, out]."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def padded(self, rank: int) -> tuple[Any, Any, float, int]:
        pad = ((0, rank - self.rank), (0, 0))
        return np.pad(self.a, pad), np.pad(self.b, pad), self.scale, self.rank


def _layer(
    path: str,
    layer: int | None,
    base: Any,
    parts: Mapping[str, np.ndarray],
    model: Model,
    config: Mapping[str, Any],
) -> _Layer:
    a, b = parts["A"], parts["B"].T
    core = tuple(base.shape[-2:])
    module = hugging_face_name(model, path, layer)
    rank = int(_pattern(config.get("rank_pattern"), module, config["r"]))
    if a.shape != (rank, core[0]) or b.shape != (rank, core[1]):
        raise ValueError(
            f"load_peft: {module}: lora_A {list(a.shape)} and lora_B "
            f"{list(parts['B'].shape)} do not fit rank {rank} and the base's [in, out] of "
            f"{list(core)}. Is this the adapter's base model?"
        )
    alpha = float(_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return _Layer(a, b, scale, parts.get("magnitude_vector"))


def _empty(rank: int, in_size: int, out_size: int) -> tuple[Any, Any, float, int]:
    return np.zeros((rank, in_size), np.float32), np.zeros((rank, out_size), np.float32), 0.0, 0


def _pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: a key matches the whole name or its end after a dot."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return value
    return default


def _filled(path: str, value: Any, pieces: Mapping[int | None, np.ndarray]) -> Any:
    """A plain array with the layers that a file holds in place."""
    for layer, piece in pieces.items():
        expected = value.shape if layer is None else value.shape[1:]
        if piece.shape != tuple(expected):
            raise ValueError(
                f"load_peft: {path} is {list(expected)}, the file has {list(piece.shape)}."
            )
        piece = jnp.asarray(piece, value.dtype)
        value = piece if layer is None else value.at[layer].set(piece)
    return value
