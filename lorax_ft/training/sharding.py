"""Sharding: a mesh of four axes, and rules that say how each parameter lies on it.

Nothing but the placement of arrays changes: the step is the same program on one device and on many,
and XLA puts the communication in. `data` splits the batch; `fsdp` splits the batch and the
parameters; `sequence` splits every text of the batch, whose parts see each other's keys and values;
`tensor` splits the arithmetic of each layer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lorax_ft import trees
from lorax_ft.axes import AXES, ROWS, SEQUENCE, TENSOR, even
from lorax_ft.leaves import Leaf
from lorax_ft.training.shares import place_rows, share_of

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh's axes; one of them may be -1, meaning all devices that are left."""

    data: int = 1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        """How many devices it is of; negative where an axis is -1."""
        return math.prod(dataclasses.asdict(self).values())

    @property
    def rows(self) -> int:
        """How many parts it splits the rows of a batch into."""
        return self.data * self.fsdp

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(
                    f"MeshConfig.{axis} must be at least 1, or -1 for the rest, got {size}."
                )
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"MeshConfig: only one axis may be -1 (the rest), got {sizes}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """How the parameters whose whole path matches `pattern` lie on the mesh.

    `spec` names the mesh axis of each of the parameter's last axes; axes in front of them, such as
    stacked layers, are not split. Where the mesh does not divide an axis, `uneven` decides:
    "raise", or "replicate" that axis.
    """

    pattern: str
    spec: PartitionSpec
    uneven: str = "raise"

    def __post_init__(self):
        if self.uneven not in ("raise", "replicate"):
            raise ValueError(f'Rule.uneven must be "raise" or "replicate", got {self.uneven!r}.')


# Kernels [in, out]: column-parallel into a sublayer and row-parallel out of it (Shoeybi et al.
# 2019, "Megatron-LM"), so that a layer needs one sum over `tensor` for each of its two sublayers. A
# kernel that the mesh does not divide raises, since copies of it on every device are not what was
# asked for; vocabularies and numbers of classes are whatever they are, so those axes are replicated
# then.
RULES: tuple[Rule, ...] = (
    Rule(pattern=r".*/(query|key|value|qkv|up|gate)/kernel", spec=PartitionSpec("fsdp", "tensor")),
    Rule(pattern=r".*/(output|down)/kernel", spec=PartitionSpec("tensor", "fsdp")),
    Rule(pattern=r"(.*/)?word/embedding", spec=PartitionSpec("tensor", "fsdp"), uneven="replicate"),
    Rule(pattern=r"(.*/)?embedding", spec=PartitionSpec(None, "fsdp"), uneven="replicate"),
    Rule(
        pattern=r"(.*/)?lm_head(/.*)?/kernel",
        spec=PartitionSpec("fsdp", "tensor"),
        uneven="replicate",
    ),
    Rule(
        pattern=r"(.*/)?(pooler|classifier|score)(/.*)?/kernel",
        spec=PartitionSpec("fsdp", None),
        uneven="replicate",
    ),
    Rule(pattern=r"(prompt|prefix)/.*", spec=PartitionSpec()),
    Rule(pattern=r"(.*/)?(bias|scale)", spec=PartitionSpec()),
)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `AXES` over the devices, by default all of every process.

    One process may use fewer devices than there are: the first ones; `idle_devices` tells.
    Raises ValueError where there
    are too few, where -1 does not come out even, and where several processes would leave devices
    idle.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values():
        if len(devices) % fixed:
            raise ValueError(f"{config} does not divide the {len(devices)} devices evenly.")
        sizes = {a: len(devices) // fixed if size == -1 else size for a, size in sizes.items()}
    wanted = math.prod(sizes.values())
    if wanted > len(devices) or (jax.process_count() > 1 and wanted != len(devices)):
        raise ValueError(
            f"{config} wants {wanted} devices, but there are {len(devices)}. Change an axis, or "
            "set one to "
            "-1 for all that are left."
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=devices[:wanted],
    )


def idle_devices(config: MeshConfig, devices: Sequence[Any] | None = None) -> str | None:
    """A sentence on the devices that a mesh of several leaves idle; None where there are none.

    A mesh of one, which is the default, asks for no others, so that nothing is said of it.

    >>> idle_devices(MeshConfig(data=3), range(8))
    'The mesh (data=3, fsdp=1, sequence=1, tensor=1) uses 3 of the 8 devices, and 5 are idle: set \
an axis to -1 for all that are left.'
    """
    count = len(jax.devices() if devices is None else devices)
    if not 1 < config.size < count:
        return None
    sizes = ", ".join(f"{axis}={size}" for axis, size in dataclasses.asdict(config).items())
    return (
        f"The mesh ({sizes}) uses {config.size} of the {count} devices, and {count - config.size} "
        "are idle: set an axis to -1 for all that are left."
    )


def shardings(params: PyTree, mesh: Mesh, rules: Sequence[Rule] = RULES) -> PyTree:
    """The `NamedSharding` of every array of params, which may be arrays or `ShapeDtypeStruct`s.

    The first rule that matches a parameter's path holds. The fields of a leaf lie as the array that
    it stands for, so adapters and quantisation constants follow their kernel; a field that is too
    small to be split evenly is replicated along that axis. Raises ValueError naming a parameter
    that no rule covers, one that its rule forbids to be uneven, and a rule that is not of `RULES`
    and holds for no parameter.

    >>> params = {"layers": {"up": {"kernel": jax.numpy.ones((2, 8, 16))}}}
    >>> found = shardings(params, make_mesh(MeshConfig()))["layers"]["up"]["kernel"]
    >>> found.spec == PartitionSpec(None, "fsdp", "tensor")
    True
    """

    def place(path: str, parameter: Any) -> Any:
        spec = _spec(path, parameter.shape, mesh, rules)
        if not isinstance(parameter, Leaf):
            return NamedSharding(mesh, spec)
        specs = parameter.partition_specs(spec)
        return jax.tree.map(
            lambda s, array: NamedSharding(mesh, even(s, array.shape, mesh)),
            specs,
            parameter,
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )

    _check_used(rules, list(trees.flatten(params)))
    return trees.map_with_path(place, params)


def shard(params: PyTree, mesh: Mesh, rules: Sequence[Rule] = RULES) -> PyTree:
    """Params placed on the mesh by `shardings`. Every process must hold the same whole params."""
    return jax.tree.map(_put, params, shardings(params, mesh, rules))


def gathered(params: PyTree, mesh: Mesh, rules: Sequence[Rule] = RULES) -> PyTree:
    """Params whose leaves say how their kernels lie within products: split over `tensor` alone.

    The devices of other axes have other rows of the batch and need whole kernels. Those in few bits
    are gathered as they are stored, layer by layer; nothing else changes. Of layers that are not
    scanned nor computed again XLA keeps the gathered bytes until the backward pass. Call it on
    params that `shard` has placed, inside the function that is compiled.
    """

    def place(path: str, parameter: Any) -> Any:
        if not isinstance(parameter, Leaf):
            return parameter
        spec = _spec(path, parameter.shape, mesh, rules)
        spec = PartitionSpec(*spec[len(parameter.stack_shape) :])
        return parameter.gathered_as(NamedSharding(mesh, _only(TENSOR, spec)))

    return trees.map_with_path(place, params)


def shardings_of(tree: PyTree) -> PyTree:
    """How the arrays of a tree lie, as the `out_shardings` of a step that keeps them so."""
    return jax.tree.map(lambda array: array.sharding, tree)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Arrays that are not on the mesh yet, copied whole to each of its devices."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(array: Any) -> jax.Array:
        here = getattr(array, "sharding", None)
        placed = isinstance(here, NamedSharding) and here.mesh == mesh
        return array if placed else _put(array, everywhere)

    return jax.tree.map(place, tree)


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A batch on the mesh, its rows split over `data` and `fsdp`, their places over `sequence`.

    Each process gives the rows of its `share_of` the mesh; the global batch is all of them. Raises
    ValueError where rows or places do not divide.
    """
    lies = {}
    for name, array in batch.items():
        rows, *places = array.shape
        lies[name] = batch_sharding(name, (rows * share_of(mesh).count, *places), mesh)
    return {name: place_rows(np.asarray(array), lies[name]) for name, array in batch.items()}


def batch_sharding(name: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """How an array of a batch lies on the mesh: `[rows, ...]` or `[rows, places, ...]`.

    Raises ValueError where rows or places do not divide.
    """
    rows, parts = shape[0], math.prod(mesh.shape[axis] for axis in ROWS)
    if rows % parts:
        raise ValueError(
            f"A batch of {rows} rows ({name}) cannot be split over data × fsdp = {parts} devices. "
            f"Choose a data.loader.batch_size that is a multiple of {parts}, or a mesh with more "
            "`tensor`."
        )
    if len(shape) == 1:
        return NamedSharding(mesh, PartitionSpec(ROWS))
    if shape[1] % mesh.shape[SEQUENCE]:
        raise ValueError(
            f"Rows of {shape[1]} places ({name}) cannot be split over sequence = "
            f"{mesh.shape[SEQUENCE]} devices. Choose data.loader.buckets that are multiples of it."
        )
    return NamedSharding(mesh, PartitionSpec(ROWS, SEQUENCE))


def _put(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """`jax.device_put`, also over several processes that each hold the whole array."""
    if getattr(array, "sharding", None) == sharding:
        return array  # read straight to its place
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _only(axis: str, spec: PartitionSpec) -> PartitionSpec:
    """The spec without the mesh's other axes."""
    named = ((names,) if isinstance(names, str) else names or () for names in spec)
    return PartitionSpec(*(axis if axis in names else None for names in named))


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[Rule]) -> PartitionSpec:
    """The spec of one parameter, as long as its shape."""
    rule = _rule_of(path, rules)
    if rule is None:
        raise ValueError(
            f"No sharding rule covers {path} {list(shape)}. Put a Rule(pattern=..., spec=...) for "
            "it in "
            f"front of the {len(rules)} there are; PartitionSpec() replicates."
        )
    if len(rule.spec) > len(shape):
        raise ValueError(f"{path} {list(shape)} has fewer axes than the spec of {rule}.")
    spec = PartitionSpec(*(None,) * (len(shape) - len(rule.spec)), *rule.spec)
    divided = even(spec, shape, mesh)
    if divided != spec and rule.uneven == "raise":
        raise ValueError(
            f"{path} {list(shape)} cannot be split by {rule.spec} over a mesh of "
            f"{dict(mesh.shape)}: an axis "
            "does not divide. Choose another mesh, or put a Rule with uneven='replicate' in front."
        )
    return divided


def _rule_of(path: str, rules: Sequence[Rule]) -> Rule | None:
    return next((rule for rule in rules if trees.matches(path, rule.pattern)), None)


def _check_used(rules: Sequence[Rule], paths: Sequence[str]) -> None:
    """Raises ValueError naming a rule that is not of `RULES` and holds for none of the paths."""
    used = [_rule_of(path, rules) for path in paths]
    for rule in rules:
        if rule not in used and rule not in RULES:
            matched = trees.select(paths, rule.pattern, field="Rule.pattern")
            raise ValueError(
                f"{rule} holds for no parameter: other rules before it cover all that it matches, "
                f"such as {matched[0]}. Put it in front of them."
            )
