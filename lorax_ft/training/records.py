"""Records of a run: `metrics.jsonl`, an object a line, and the same numbers for TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

Write = Callable[[str, int, Mapping[str, float | None]], None]  # (kind, step, values)


@contextlib.contextmanager
def open_records(
    directory: str | pathlib.Path, restored_step: int | None, *, tensorboard: bool = True
) -> Iterator[Write]:
    """Gives `write(kind, step, values)`, which appends to `metrics.jsonl` and to `tensorboard/`.

    A run that goes on from `restored_step` first cuts away what was recorded after it, and one that
    starts anew (None) everything, so that no step stands there twice. Each line is on disk before
    `write` returns. Numbers that are not finite are written as null.
    """
    directory = pathlib.Path(directory)
    path = directory / "metrics.jsonl"
    _truncate(path, restored_step)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("a"))
        events = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            purge = 0 if restored_step is None else restored_step + 1
            events = stack.enter_context(
                SummaryWriter(str(directory / "tensorboard"), purge_step=purge)
            )

        def write(kind: str, step: int, values: Mapping[str, float | None]) -> None:
            line = {name: _finite(value) for name, value in values.items()}
            file.write(json.dumps({"step": step, "kind": kind} | line) + "\n")
            file.flush()
            for name, value in values.items():
                if events is not None and value is not None:
                    events.add_scalar(f"{kind}/{name}", value, step)

        yield write


def read_records(directory: str | pathlib.Path) -> list[dict]:
    """The lines of a run's `metrics.jsonl`, without one that was cut off in the middle."""
    path = pathlib.Path(directory) / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def _truncate(path: pathlib.Path, restored_step: int | None) -> None:
    kept = [r for r in read_records(path.parent) if r["step"] <= (restored_step or -1)]
    new = path.with_suffix(".jsonl.new")
    new.write_text("".join(json.dumps(record) + "\n" for record in kept))
    os.replace(new, path)


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None
