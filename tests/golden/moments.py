"""Parameters and gradients by formula, for adamw8bit.npz and the test that reads it."""

import numpy as np

SHAPES = {"rows": (17, 256), "ragged": (33, 127)}  # 4,352 and 4,191 numbers


def parameters(name: str) -> np.ndarray:
    index = np.arange(np.prod(SHAPES[name]))
    return (0.05 * np.sin(0.7 * index)).astype(np.float32).reshape(SHAPES[name])


def gradient(name: str, step: int) -> np.ndarray:
    """Of magnitudes that differ by five powers of ten within a block, some of them zero."""
    index = np.arange(np.prod(SHAPES[name]))
    size = 10.0 ** -((index * 7) % 6)
    found = size * np.sin(0.3 * index + 0.11 * step) * np.cos(0.017 * step * (1 + index % 5))
    found[index % 41 == 0] = 0.0
    return found.astype(np.float32).reshape(SHAPES[name])
