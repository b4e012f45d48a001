"""LoRA as PEFT keeps it: rsLoRA, DoRA, adapted embeddings, ranks and alphas by pattern, subsets of
layers."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_ft import trees
from lorax_ft.interop import files
from lorax_ft.methods import DoRA, LoRA
from lorax_ft.models.hugging_face import Tables, is_turned, module_name

PREFIX = "base_model.model."

# Fields of adapter_config.json that are read, or that change nothing once an adapter is trained.
READ = frozenset(
    """
    r lora_alpha rank_pattern alpha_pattern use_rslora use_dora bias modules_to_save
    target_modules exclude_modules layers_to_transform layers_pattern lora_dropout
    init_lora_weights megatron_core loftq_config qalora_group_size fan_in_fan_out runtime_config
    """.split()
)

_TENSOR = re.compile(
    r"(?P<module>.+?)\.(?:(?P<part>lora_A|lora_B)(?:\.\w+)?\.weight"
    r"|(?P<embedding>lora_embedding_[AB])(?:\.\w+)?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.\w+)?(?:\.weight)?"
    r"|base_layer\.(?P<bias>bias))"
)


# --- Out ------------------------------------------------------------------------------------------


def to_peft(
    tables: Tables, params: Any, trainable: trees.Patterns, *, dropout: float, rslora: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields of the config, tensors) of the LoRA leaves and of the arrays that are saved whole."""
    tensors, modules = _adapter_tensors(tables, params)
    saved, biases = files.plain_tensors(tables, params, trainable, set(modules))
    config = {
        **_ranks_and_alphas(modules, rslora),
        "bias": biases,
        "fan_in_fan_out": _fan_in_fan_out(tables, params),
        "init_lora_weights": True,
        "lora_dropout": dropout,
        "modules_to_save": files.modules_of(saved, biases, tables),
        "target_modules": sorted(modules),
        "use_dora": any(isinstance(v, DoRA) for v in trees.flatten(params).values()),
        "use_rslora": rslora,
    }
    return config, {PREFIX + name: tensor for name, tensor in {**tensors, **saved}.items()}


def _fan_in_fan_out(tables: Tables, params: Any) -> bool:
    """PEFT's word for adapted kernels that are stored [in, out]; the factors are the same."""
    return any(
        isinstance(value, (LoRA, DoRA)) and path.endswith("/kernel") and not is_turned(tables, path)
        for path, value in trees.flatten(params).items()
    )


def _adapter_tensors(
    tables: Tables, params: Any
) -> tuple[dict[str, Any], dict[str, tuple[int, float]]]:
    """Tensors by PEFT's name, and the (rank, scale) of each adapted module."""
    tensors, modules = {}, {}
    for path, value in trees.flatten(params).items():
        if not isinstance(value, (LoRA, DoRA)):
            continue
        lora = value.base if isinstance(value, DoRA) else value
        for index in np.ndindex(lora.stack_shape):
            rank = int(lora.rank[index])
            if rank == 0:
                continue
            name = module_name(tables.names, path, *index)
            modules[name] = (rank, float(lora.scale[index]))
            a, b = np.asarray(lora.a[index])[:rank], np.asarray(lora.b[index])[:rank].T
            if path.endswith("/embedding"):
                tensors |= {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
            else:
                tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            if isinstance(value, DoRA):
                tensors[f"{name}.lora_magnitude_vector"] = np.asarray(value.magnitude[index])
    return tensors, modules


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


def from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], tables: Tables, params: Any
) -> tuple[Any, tuple[str, ...]]:
    """Params with LoRA leaves, and the patterns of the arrays that were saved whole."""
    _check(config)
    adapters, plain = _sorted_tensors(tensors, tables, params)
    files.warn_of_orientation(config, adapters, tables)
    parameters = trees.flatten(params)
    leaves = {p: _leaf(p, parameters[p], layers, tables, config) for p, layers in adapters.items()}
    params, trained = files.fill(params, plain)
    return trees.with_fields(params, leaves), trained


def _check(config: Mapping[str, Any]) -> None:
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool) and start != "gaussian":
        raise ValueError(
            f"{files.CONFIG}: init_lora_weights is {start!r}, which changed the base weights: the "
            "adapter does not fit the base as published. Convert it to a plain LoRA first."
        )
    files.check_fields(config, READ, required=("r", "lora_alpha"))


Layers = dict[int | None, dict[str, np.ndarray]]


def _sorted_tensors(
    tensors: Mapping[str, np.ndarray], tables: Tables, params: Any
) -> tuple[dict[str, Layers], files.Pieces]:
    """Adapter tensors by our path and layer, and plain tensors by our path and layer."""
    adapters: dict[str, Layers] = collections.defaultdict(lambda: collections.defaultdict(dict))
    plain: files.Pieces = {}
    paths = trees.flatten(params)
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = _TENSOR.fullmatch(name)
        if match and not match["bias"]:
            part = match["part"] or match["embedding"] or match["magnitude"]
            kinds = ("embedding",) if match["embedding"] else ("kernel",)
            path, layer = files.our_path(key, match["module"], kinds, tables, paths)
            adapters[path][layer][part.removeprefix("lora_").removeprefix("embedding_")] = tensor
        else:
            name = f"{match['module']}.bias" if match else name
            files.add_plain(plain, key, name, tensor, tables, paths)
    return adapters, plain


def _leaf(
    path: str, base: Any, layers: Layers, tables: Tables, config: Mapping[str, Any]
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
        rows[layer or 0] = _layer(path, layer, base, parts, tables, config)
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
    tables: Tables,
    config: Mapping[str, Any],
) -> _Layer:
    a, b = parts["A"], parts["B"].T
    core = tuple(base.shape[-2:])
    module = module_name(tables.names, path, layer)
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
