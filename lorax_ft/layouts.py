"""How the axes of an array relate to the axes of the parameter it was transposed and reshaped from.

A model may transpose a kernel, split its last axis into heads or add an axis of size one before it
multiplies with it. `Layout` follows that: each axis of the parameter is cut into *atoms* (a number
and a size), and each axis of the current array is a sequence of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

Atom = tuple[int, int]  # (number, size)
Atoms = tuple[Atom, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """`origin[i]`: atoms of the parameter's axis i, outermost first; `axes[i]`: those of the
    array's axis i."""

    origin: tuple[Atoms, ...]
    axes: tuple[Atoms, ...]

    @classmethod
    def of(cls, shape: Sequence[int]) -> Layout:
        """The layout of a parameter that nothing has been done to."""
        axes = tuple(((i, size),) if size != 1 else () for i, size in enumerate(shape))
        return cls(axes, axes)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size_of(axis) for axis in self.axes)

    @property
    def untouched(self) -> bool:
        return self.axes == self.origin

    def transpose(self, permutation: Sequence[int]) -> Layout:
        return Layout(self.origin, tuple(self.axes[i] for i in permutation))

    def squeeze(self, dimensions: Sequence[int]) -> Layout:
        return Layout(self.origin, tuple(a for i, a in enumerate(self.axes) if i not in dimensions))

    def expand(self, shape: Sequence[int], dimensions: Sequence[int]) -> Layout | None:
        """After `broadcast_in_dim`; None where it repeats values rather than adds axes of size
        one."""
        placed = dict(zip(dimensions, self.axes))
        axes = tuple(placed.get(i, ()) for i in range(len(shape)))
        return Layout(self.origin, axes) if tuple(map(size_of, axes)) == tuple(shape) else None

    def reshape(self, shape: Sequence[int]) -> Layout | None:
        """After `reshape`, in row-major order; None where an axis is cut at no divisor."""
        origin = [list(axis) for axis in self.origin]
        rest = [atom for axis in self.axes for atom in axis]
        axes: list[Atoms] = []
        for size in shape:
            axis: list[Atom] = []
            while (missing := size // size_of(axis)) > 1:
                atom = rest.pop(0)
                if atom[1] > missing:
                    if atom[1] % missing:
                        return None
                    atom, tail = _split(origin, atom, missing)
                    rest.insert(0, tail)
                elif missing % atom[1]:
                    return None
                axis.append(atom)
            axes.append(tuple(axis))
        return Layout(tuple(map(tuple, origin)), tuple(axes))

    def drop_front(self) -> Layout | None:
        """After `scan` has taken a slice of the first axis; None where that is not the parameter's
        first axis."""
        if not self.axes or not self.origin or self.axes[0] != self.origin[0]:
            return None
        return Layout(self.origin[1:], self.axes[1:])

    def origin_of(self, axes: Sequence[int]) -> tuple[int, ...] | None:
        """The parameter's axes that make up these axes of the array; None where one is there only
        in part."""
        atoms = {atom for i in axes for atom in self.axes[i]}
        found = tuple(i for i, axis in enumerate(self.origin) if axis and set(axis) <= atoms)
        return found if {a for i in found for a in self.origin[i]} == atoms else None


def size_of(atoms: Sequence[Atom]) -> int:
    return math.prod(size for _, size in atoms)


def _split(origin: list[list[Atom]], atom: Atom, outer: int) -> tuple[Atom, Atom]:
    """Cuts an atom in two, the first of size `outer`, in the parameter's axis that has it."""
    fresh = 1 + max(number for axis in origin for number, _ in axis)
    head, tail = (fresh, outer), (fresh + 1, atom[1] // outer)
    for axis in origin:
        if atom in axis:
            at = axis.index(atom)
            axis[at : at + 1] = [head, tail]
    return head, tail
