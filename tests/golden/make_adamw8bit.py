"""Makes adamw8bit.npz: bitsandbytes' 8-bit AdamW, its maps, its codes and its steps.

Run with torch 2.13 (CPU) and bitsandbytes 0.50.2, which the project itself does not need:

    python -m tests.golden.make_adamw8bit

What a GPU computes is its CUDA kernel's (csrc/cuda/optimizers.cu, `kOptimizerStatic8bit2State
Blockwise`), which `cuda_step` says in NumPy; the package's CPU kernel has the same update but looks
codes up on a grid of 65,536 points of [-1, 1], which is too coarse for second moments: zero becomes
1.5e-5 of the block's largest. So three things are kept:

- `codes.*`: random blocks and what `quantize_blockwise` makes of them with either map, by the
  package's path for float64, which takes the nearest code;
- `update.*`: a state, a gradient, and what the package's own CPU kernel makes of parameters and
  absmax in one update;
- `run.*`: parameters and states after 1 and after 100 steps of `cuda_step`.
"""

import pathlib

import bitsandbytes.functional as F
import numpy as np
import torch

from tests.golden.moments import SHAPES, gradient, parameters

OUT = pathlib.Path(__file__).parent / "adamw8bit.npz"
LEARNING_RATE, B1, B2, EPS, DECAY = 1e-3, 0.9, 0.999, 1e-8, 0.01
SIGNED = F.create_dynamic_map(signed=True).numpy()
UNSIGNED = F.create_dynamic_map(signed=False).numpy()
f32 = np.float32


def blocks_of(values: np.ndarray) -> np.ndarray:
    flat = values.reshape(-1)
    return np.pad(flat, (0, -flat.size % 256)).reshape(-1, 256)


def decode(codes: np.ndarray, absmax: np.ndarray, table: np.ndarray) -> np.ndarray:
    values = table[blocks_of(codes)] * absmax[:, None]
    return values.reshape(-1)[: codes.size].reshape(codes.shape)


def encode(values: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The kernel's search: nearest entry, ties to the even code, no negative value to zero."""
    blocks = blocks_of(values)
    absmax = np.abs(blocks).max(axis=1)
    with np.errstate(invalid="ignore"):
        shares = blocks / absmax[:, None]
    midpoints = (table[:-1] + table[1:]) * f32(0.5)
    low, high = (np.searchsorted(midpoints, shares, side=side) for side in ("left", "right"))
    codes = np.where(low % 2 == 0, low, high)  # they differ at a midpoint alone
    zero = int(np.flatnonzero(table == 0)[0])
    codes = np.where((blocks < 0) & (codes == zero), zero - 1, codes)
    codes = np.where(absmax[:, None] > 0, codes, zero)  # any code stands for zero there
    return codes.reshape(-1)[: values.size].reshape(values.shape).astype(np.uint8), absmax


def cuda_step(p: np.ndarray, g: np.ndarray, state: list[np.ndarray], step: int) -> np.ndarray:
    """Changes `state` (codes and absmax of m, of v) and returns the parameters."""
    m = decode(state[0], state[1], SIGNED) * f32(B1) + f32(1 - f32(B1)) * g
    v = decode(state[2], state[3], UNSIGNED) * f32(B2) + f32(1 - f32(B2)) * g * g
    first, second = f32(1) - f32(B1**step), np.sqrt(f32(1) - f32(B2**step))
    size = -f32(LEARNING_RATE) * second / first
    p = p + size * (m / (np.sqrt(v) + second * f32(EPS)))
    state[:2], state[2:] = encode(m, SIGNED), encode(v, UNSIGNED)
    return p * (f32(1) - f32(LEARNING_RATE) * f32(DECAY))


def run(name: str, steps: int) -> tuple[np.ndarray, list[np.ndarray]]:
    p = parameters(name)
    blocks = blocks_of(p).shape[0]
    state = [np.zeros(p.shape, np.uint8), np.zeros(blocks, f32)] * 2
    for step in range(1, steps + 1):
        p = cuda_step(p, gradient(name, step), state, step)
    assert p.dtype == f32
    return p, state


def packages_update(name: str, steps: int) -> dict[str, np.ndarray]:
    """One update by the package itself, from where `steps` of `run` end."""
    p, state = run(name, steps)
    given = {"p": p, "g": gradient(name, steps + 1)}
    given |= dict(zip(("m", "m_absmax", "v", "v_absmax"), state))
    t = {key: torch.from_numpy(value.copy()) for key, value in given.items()}
    maps = torch.from_numpy(SIGNED.copy()), torch.from_numpy(UNSIGNED.copy())
    F.optimizer_update_8bit_blockwise(
        *("adam", t["g"], t["p"], t["m"], t["v"], B1, B2, 0.0, 0.0, EPS, steps + 1, LEARNING_RATE),
        *(*maps, t["m_absmax"], t["v_absmax"], DECAY),
    )
    return given | {f"new_{key}": t[key].numpy() for key in ("p", "m_absmax", "v_absmax")}


def packages_codes() -> dict[str, np.ndarray]:
    """Random blocks, and the codes that the package gives them."""
    random = np.random.default_rng(0)
    values = random.standard_normal((16, 256)) * 10.0 ** -random.integers(0, 7, (16, 256))
    found = {"values": values.astype(f32)}
    quantize = torch.ops.bitsandbytes.quantize_blockwise.default
    for key, table in {"signed": SIGNED, "unsigned": UNSIGNED}.items():
        given = torch.from_numpy(found["values"]).double()
        given = given if key == "signed" else given.abs()
        codes, absmax = quantize(given, torch.from_numpy(table.copy()), 256)
        found |= {key: codes.numpy(), f"{key}_absmax": absmax.numpy()}
    return found


def main() -> None:
    kept = {"signed_map": SIGNED, "unsigned_map": UNSIGNED}
    kept |= {f"codes.{key}": value for key, value in packages_codes().items()}
    kept |= {f"update.{key}": value for key, value in packages_update("rows", 20).items()}
    for name in SHAPES:
        for steps in (1, 100):
            p, state = run(name, steps)
            states = dict(zip(("m", "m_absmax", "v", "v_absmax"), state))
            kept |= {f"run.{name}.{steps}.{key}": x for key, x in {"p": p, **states}.items()}
    np.savez_compressed(OUT, **kept)
    print(f"{OUT.name}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
