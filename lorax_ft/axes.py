"""The names of a mesh's axes, which models and the placement of arrays share."""

from __future__ import annotations

ROWS = ("data", "fsdp")  # split the rows of a batch; "fsdp" the parameters too
SEQUENCE = "sequence"  # splits the places of a text
TENSOR = "tensor"  # splits the arithmetic of a layer, its heads among it
AXES = (*ROWS, SEQUENCE, TENSOR)  # outermost first
