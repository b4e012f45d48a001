"""Which tensor of a checkpoint is which parameter of a model; whatever disagrees raises."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_ft.models import hugging_face
from lorax_ft.models.four_bit import FourBitFiles
from lorax_ft.models.model import Model
from lorax_ft.models.t5_config import T5Config
from lorax_ft.models.tensor_files import TensorFiles
from lorax_ft.quantization import FourBit
from lorax_ft.trees import flatten

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint's tensors by the names that the family's tables use."""

    tensors: TensorFiles | FourBitFiles
    file_names: Mapping[str, str]  # the checkpoint's own name for each

    @property
    def directory(self) -> pathlib.Path:
        return next(iter(self.tensors.handles)).parent

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.shape(self.file_names[name])

    def is_four_bit(self, name: str) -> bool:
        """Whether `read` gives a four-bit leaf, whose kernel is `[in, out]`."""
        return self.file_names.get(name) in self.tensors.four_bit

    def four_bit_like(self, name: str) -> FourBit:
        """A four-bit leaf of `ShapeDtypeStruct`s."""
        assert isinstance(self.tensors, FourBitFiles)
        return self.tensors.like(self.file_names[name])

    def place_four_bit(self, name: str, shardings: Any) -> FourBit:
        """A four-bit leaf, each of its arrays laid as the leaf of shardings says."""
        assert isinstance(self.tensors, FourBitFiles)
        return self.tensors.place(self.file_names[name], shardings)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Any:
        """The tensor or that slice of it; a four-bit leaf has no slices."""
        array = self.tensors.read(self.file_names[name], index)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{self.where(name)} has dtype {array.dtype}, not a float.")
        return array

    def where(self, name: str) -> str:
        own = self.file_names[name]
        return f"{self.tensors.file_of[own]}: the tensor {own!r}"


def named(model: Model, tensors: TensorFiles | FourBitFiles) -> Checkpoint:
    """Renames tensors as the tables do: old endings, and the prefix that a bare model lacks."""
    tables = model.family.tables
    whole = (*tables.names.values(), *tables.foreign, *tables.tied, *tables.copies)
    known = (tables.prefix, *(name for name in whole if not name.startswith(tables.prefix)))
    file_names: dict[str, str] = {}
    for own, file in tensors.file_of.items():
        name = own
        for old, new in tables.old_suffixes.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        if not name.startswith(known):
            name = tables.prefix + name
        if name in file_names:
            raise ValueError(f"{file}: {own!r} and {file_names[name]!r} are both {name!r}.")
        file_names[name] = own
    for repetition, name in {**tables.copies, **tables.tied}.items():
        if repetition in file_names and name not in file_names:
            file_names[name] = file_names.pop(repetition)
    return Checkpoint(tensors=tensors, file_names=file_names)


def with_own_head(model: Model, checkpoint: Checkpoint) -> Model:
    """The model, its head untied from the word table where the checkpoint has one that differs.

    So transformers 5 reads a T5, for it writes `tie_word_embeddings` as true whatever there is.
    """
    head, table = "lm_head.weight", "shared.weight"
    if not isinstance(model.config, T5Config) or model.task != "seq2seq_lm":
        return model
    if not {head, table} <= set(checkpoint.file_names):
        return model
    if np.array_equal(checkpoint.read(head), checkpoint.read(table)):
        return model
    config = dataclasses.replace(model.config, tie_word_embeddings=False)
    return dataclasses.replace(model, config=config)


def tensor_names(model: Model, path: str, shape: tuple[int, ...]) -> dict[int | None, str]:
    """The tensors that make up a parameter, by layer; by None where it is not stacked."""
    layers = range(shape[0]) if hugging_face.is_stacked(path) else (None,)
    names = model.family.tables.names
    return {layer: hugging_face.tensor_name(names, path, layer) for layer in layers}


def new_parameters(model: Model, checkpoint: Checkpoint, *, resized: bool) -> list[str]:
    """Paths of heads that the checkpoint lacks or, where `resized`, has for other classes."""
    tables = model.family.tables
    shapes = flatten(model.shapes())
    heads: dict[str, list[str]] = {}
    for path in shapes:
        if (head := path.partition("/")[0]) in tables.new_heads:
            heads.setdefault(head, []).append(path)

    def is_missing(path: str) -> bool:
        return hugging_face.tensor_name(tables.names, path) not in checkpoint.file_names

    def has_other_size(path: str) -> bool:
        shape = checkpoint.shape(hugging_face.tensor_name(tables.names, path))
        return shape[0] != shapes[path].shape[-1]

    new = []
    for paths in heads.values():
        if all(map(is_missing, paths)):
            new += paths
        elif resized:
            new += [path for path in paths if not is_missing(path) and has_other_size(path)]
    return new


def check_complete(model: Model, checkpoint: Checkpoint, new: list[str]) -> None:
    """Raises ValueError for a parameter without a tensor, a wrong shape, or a tensor left over.

    Parameters in `new` need no tensor.
    """
    missing, used = [], set()
    for path, parameter in flatten(model.shapes()).items():
        names = tensor_names(model, path, parameter.shape)
        used.update(names.values())
        if path in new:
            continue
        shape = parameter.shape if None in names else parameter.shape[1:]
        turned = hugging_face.is_turned(model.family.tables, path)
        for name in names.values():
            if name not in checkpoint.file_names:
                missing.append(name)
                continue
            expected = shape[::-1] if turned or checkpoint.is_four_bit(name) else shape
            if checkpoint.shape(name) != expected:
                raise ValueError(
                    f"{checkpoint.where(name)} has shape {list(checkpoint.shape(name))}, but "
                    f"config.json makes it {list(expected)}."
                )
    if missing:
        raise ValueError(
            f"{checkpoint.directory} lacks {len(missing)} tensors that the model needs: "
            f"{_some(missing)}."
        )
    _check_left_over(model, checkpoint, set(checkpoint.file_names) - used)


def _check_left_over(model: Model, checkpoint: Checkpoint, names: set[str]) -> None:
    """Raises ValueError for a tensor that is no buffer, other task's head or true repetition."""
    tables = model.family.tables
    own = {hugging_face.split_layer(p)[0].rpartition("/")[0] for p in flatten(model.shapes())}
    repetitions = dict(tables.copies)
    if model.task in ("masked_lm", "causal_lm", "seq2seq_lm"):
        repetitions.update(tables.tied)
    unknown, unread = [], []
    for name in sorted(names):
        module, layer = hugging_face.module_path(tables.names, name.rpartition(".")[0]) or (
            "",
            None,
        )
        is_surplus = layer is not None and module in own  # a layer more than the model has
        if name in repetitions:
            _check_repetition(checkpoint, name, repetitions[name])
        elif (
            name in tables.tied
            or (module.partition("/")[0] in tables.heads and not is_surplus)
            or any(hugging_face.match_name(template, name) for template in tables.foreign)
        ):
            unread.append(name)
        else:
            unknown.append(checkpoint.file_names[name])
    if unknown:
        raise ValueError(
            f"{checkpoint.directory} has {len(unknown)} tensors that nothing reads in a "
            f"{type(model.config).__name__} of {model.config.num_hidden_layers} layers for the "
            f"task {model.task}: {_some(unknown)}."
        )
    if unread:
        logger.info("Left unread, since the task is %s: %s.", model.task, ", ".join(unread))


def _check_repetition(checkpoint: Checkpoint, name: str, original: str) -> None:
    if not np.array_equal(checkpoint.read(name), checkpoint.read(original)):
        raise ValueError(
            f"{checkpoint.where(name)} is not the same as {original!r}, though the config ties "
            "them (tie_word_embeddings)."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
