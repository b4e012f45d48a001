"""How tests compile: quickly on the CPU, and by the compilers of devices that are not there."""

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator

import pytest

# XLA's flags that halve what a program takes to compile, each with what a user's process has: one
# piece of LLVM code a program, and up to JAX 0.10 the emitters of fusions that it had before.
_QUICK = {"xla_cpu_parallel_codegen_split_count": (1, 32)}
if importlib.metadata.version("jax").startswith("0.10."):
    _QUICK["xla_cpu_use_fusion_emitters"] = (False, True)


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of a process with so many fake devices, which compiles quickly unless
    JAX_DISABLE_MOST_OPTIMIZATIONS=0."""
    flags = {"xla_force_host_platform_device_count": devices}
    if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
        flags |= {name: quick for name, (quick, _) in _QUICK.items()}
    return " ".join(f"--{name}={value}".lower() for name, value in flags.items())


@contextlib.contextmanager
def as_a_user() -> Iterator[None]:
    """What is compiled within it is what a user's process would compile."""
    import jax
    from jax._src import compiler

    jax.clear_caches()  # what was compiled quickly
    options_of = compiler.get_compile_options
    before = jax.config.values["jax_disable_most_optimizations"]
    users = {name: users for name, (_, users) in _QUICK.items()}

    def options(*args, env_options_overrides=None, **rest):
        overrides = {**users, **(env_options_overrides or {})}
        return options_of(*args, env_options_overrides=overrides, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", options)
        jax.config.update("jax_disable_most_optimizations", False)
        try:
            yield
        finally:
            jax.config.update("jax_disable_most_optimizations", before)
            jax.clear_caches()


needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)
needs_gpu_compiler = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))),
    reason="jax's CUDA plugin, the GPU compiler, is not installed",
)
