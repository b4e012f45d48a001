"""Kernels in four or eight bits that are dequantised inside each product."""

from lorax_ft.quantization.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from lorax_ft.quantization.int8 import Int8
from lorax_ft.quantization.nf4 import FP4, NF4, FourBit
from lorax_ft.quantization.quantize import (
    QuantizationConfig,
    bits_per_parameter,
    quantize,
    quantize_array,
)
from lorax_ft.quantization.quantized import Quantized

__all__ = [
    "FP4",
    "NF4",
    "FourBit",
    "Int8",
    "QuantizationConfig",
    "Quantized",
    "bits_per_parameter",
    "from_bitsandbytes",
    "quantize",
    "quantize_array",
    "to_bitsandbytes",
]
