"""Checkpoints of bitsandbytes: four-bit weights in Hugging Face directories, in and out.

In such a directory a module's `weight` holds codes, two to a byte, and tensors whose names go on
from it (`weight.absmax` and so on) say what they mean. Nothing is dequantised on either way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lorax_ft.leaves import is_leaf
from lorax_ft.models.tensor_files import TensorFiles
from lorax_ft.quantization import QuantizationConfig, quantize_array
from lorax_ft.quantization.bitsandbytes import (
    LEAVES,
    from_bitsandbytes,
    kind_of,
    to_bitsandbytes,
    without_codes,
)
from lorax_ft.quantization.nf4 import FourBit
from lorax_ft.quantization.slices import Index, convert_slices, place

# How a checkpoint may say that it is of bitsandbytes and in four bits, and what changes nothing.
_REQUIRED = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
_READ = {"_load_in_4bit", "_load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"}
_HARMLESS = {
    *("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "llm_int8_enable_fp32_cpu_offload"),
    *("llm_int8_has_fp16_weight", "llm_int8_skip_modules", "llm_int8_threshold"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourBitFiles:
    """Tensors of which some are four-bit weights; those by their own names and in their own shapes.

    Read as `TensorFiles` are.
    """

    files: TensorFiles
    parts: Mapping[str, tuple[str, ...]]  # of each four-bit weight, the tensors it is made of
    file_of: Mapping[str, pathlib.Path]  # by tensor name, parts left out

    @property
    def handles(self) -> Mapping[pathlib.Path, Any]:
        return self.files.handles

    @property
    def four_bit(self) -> Collection[str]:
        """The names of weights that `read` gives as leaves."""
        return self.parts.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """As torch has it, `[out, in]`, also where the weights of the family are `[in, out]`."""
        if name not in self.parts:
            return self.files.shape(name)
        state = next(part for part in self.parts[name] if ".quant_state." in part)
        return tuple(json.loads(self.files.read(state).tobytes())["shape"])

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Any:
        """An array or a slice of it, or the whole leaf of a four-bit weight: of numpy arrays, for a
        kernel `[in, out]`.

        Raises ValueError naming the weight whose parts do not fit together.
        """
        if name not in self.parts:
            return self.files.read(name, index)
        tensors = {part: self.files.read(own) for part, own in self._parts(name).items()}
        with self._naming(name):
            return from_bitsandbytes(tensors)

    def like(self, name: str) -> FourBit:
        """What `read` gives of a four-bit weight, of `ShapeDtypeStruct`s. Raises as it does."""
        with self._naming(name):
            kernel = without_codes(self._small(name))
            config = QuantizationConfig(
                kind=kind_of(kernel),
                block_size=kernel.block_size,
                double_quantization=kernel.nested_absmax is not None,
            )
            shape = jax.ShapeDtypeStruct(kernel.core_shape, kernel.dtype)
            return quantize_array(shape, config)  # pyright: ignore[reportReturnType]

    def place(self, name: str, shardings: Any) -> FourBit:
        """What `read` gives of a four-bit weight, on a mesh: a process reads its devices' slices.

        `shardings` is the leaf with a `NamedSharding` in place of each array. Weights whose blocks
        run over their rows' ends are read whole. Raises as `read` does.
        """
        fields = ("packed", "absmax", "nested_absmax", "offset")
        lies = {field: getattr(shardings, field) for field in fields}
        with self._naming(name):
            kernel, own = without_codes(self._small(name)), self._parts(name)
        if not kernel.blocked:
            whole = self.read(name)
            return jax.tree.map(place, whole, whole.replace(**lies))

        def read(part: str, shape: tuple[int, int], index: Index) -> np.ndarray:
            dtype = np.uint8 if part == "weight" else None  # it may be stored as bfloat16
            return self.files.read(own[part], index, shape=shape, dtype=dtype)

        with self._naming(name):
            return convert_slices(read, kernel, kernel.replace(**lies))

    def _parts(self, name: str) -> dict[str, str]:
        """The files' names of a four-bit weight's tensors by those of bitsandbytes."""
        stem = name.removesuffix("weight")
        return {part.removeprefix(stem): part for part in self.parts[name]}

    def _small(self, name: str) -> dict[str, Any]:
        """A four-bit weight's tensors, None for those that grow with it."""
        large = ("weight", "weight.absmax")
        return {
            part: None if part in large else self.files.read(own)
            for part, own in self._parts(name).items()
        }

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.file_of[name]}: the tensor {name!r}: {error}") from None


def check_quantization(config: Mapping[str, Any]) -> None:
    """Raises ValueError where a config.json's quantization_config is not of four-bit weights."""
    for name, value in _REQUIRED.items():
        if config.get(name, value) != value or (name == "load_in_4bit" and name not in config):
            raise ValueError(
                f"config.json: quantization_config has {name} = {config.get(name)!r}; only "
                f"four-bit checkpoints of bitsandbytes are read, with {value!r}."
            )
    if unknown := sorted(set(config) - set(_REQUIRED) - _READ - _HARMLESS):
        raise ValueError(
            f"config.json: quantization_config has {unknown[0]} = {config[unknown[0]]!r}, which is "
            "not known here and may change what the weights are."
        )


def four_bit_files(tensors: TensorFiles) -> FourBitFiles:
    """The same tensors, with those that belong to a four-bit weight hidden behind it."""
    parts: dict[str, tuple[str, ...]] = {}
    for name in tensors.file_of:
        stem, found, _ = name.partition(".weight.quant_state.bitsandbytes__")
        if found:
            weight = f"{stem}.weight"
            own = [n for n in tensors.file_of if n == weight or n.startswith(f"{weight}.")]
            parts[weight] = tuple(own)
    hidden = {part for weight, own in parts.items() for part in own if part != weight}
    seen = {name: path for name, path in tensors.file_of.items() if name not in hidden}
    return FourBitFiles(files=tensors, parts=parts, file_of=seen)


def tensors_of(name: str, kernel: FourBit) -> dict[str, np.ndarray]:
    """The tensors of one weight `[in, out]` by the names that a checkpoint has for them."""
    stem = name.removesuffix("weight")
    return {stem + part: tensor for part, tensor in to_bitsandbytes(kernel).items()}


def layer_of(kernel: FourBit, layer: int | None) -> FourBit:
    """One layer's kernel of a stack, or the kernel itself, of numpy arrays."""
    return jax.tree.map(lambda field: np.asarray(field if layer is None else field[layer]), kernel)


def quantization_config(
    kernels: Mapping[str, FourBit], linear: Mapping[str, Any]
) -> dict[str, Any]:
    """The quantization_config of a config.json.

    Args:
        kernels: the four-bit leaves by our path.
        linear: every kernel of a linear layer by the name of its module, leaf or not, and what is
            tied to a table of vectors.

    Raises ValueError where leaves are of different kinds: transformers knows one for a model.
    """
    schemes = {(type(k), k.nested_absmax is not None, k.dtype) for k in kernels.values()}
    if len(schemes) > 1:
        raise ValueError(
            "A checkpoint of bitsandbytes has one kind of four-bit weights; these parameters have "
            f"{', '.join(sorted({_scheme(kernel) for kernel in kernels.values()}))}."
        )
    ((leaf_type, is_double, dtype),) = schemes
    return {
        **_REQUIRED,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(dtype),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": next(n for n, t in LEAVES.items() if t is leaf_type),
        "bnb_4bit_use_double_quant": is_double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": sorted(n for n, k in linear.items() if not is_leaf(k)),
        "llm_int8_threshold": 6.0,
    }


def _scheme(kernel: FourBit) -> str:
    nested = " with double quantisation" if kernel.nested_absmax is not None else ""
    return f"{type(kernel).__name__}{nested} in {kernel.dtype}"
