"""Marks of tests that ask the compiler of a device that is not there."""

import importlib.util

import pytest

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)
needs_gpu_compiler = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))),
    reason="jax's CUDA plugin, the GPU compiler, is not installed",
)
