"""The benchmark's table in Markdown and its figure, of the rows that run.py has written.

    python experiments/accelerator/report.py results.csv

Writes results.md and members.png beside the rows.
"""

from __future__ import annotations

import pathlib
import sys

from common import read_rows

Row = dict[str, str]
SHOWN = {
    "part": "part",
    "variant": "variant",
    "rows": "rows",
    "step_s": "step, s",
    "tokens_per_s": "tokens a s",
    "mfu": "MFU",
    "peak_gib": "allocator, GiB",
    "compiler_gib": "compiler, GiB",
    "build_s": "built in, s",
}


def text(rows: list[Row]) -> str:
    """All tables of a benchmark."""
    steps = [r for r in rows if r["part"] in ("lora", "qlora", "peer_lora", "peer_qlora")]
    pieces = [
        _devices(rows),
        _table([{title: r[key] for key, title in SHOWN.items()} for r in steps]),
    ]
    pieces += [_table(plans(rows)), _table(members(rows))]
    pieces += [f"{r['part']} {r['variant']} {r['rows']}: {r['note']}" for r in rows if _is_told(r)]
    return "\n\n".join(piece for piece in pieces if piece) + "\n"


def plans(rows: list[Row]) -> list[dict[str, str]]:
    """What was planned beside what the allocator counted, of the same step."""
    held = {(r["part"], r["variant"]): r["peak_gib"] for r in rows if r["peak_gib"]}
    found = []
    for row in rows:
        if not row["part"].startswith("plan_") or not row["compiler_gib"]:
            continue
        counted = held.get((row["part"].removeprefix("plan_"), row["variant"]), "")
        planned = float(row["compiler_gib"])
        found.append(
            {
                "plan": row["part"].removeprefix("plan_"),
                "variant": row["variant"],
                "planned, GiB": row["compiler_gib"],
                "allocator, GiB": counted,
                "planned / allocator - 1": f"{planned / float(counted) - 1:+.3f}"
                if counted
                else "",
            }
        )
    return found


def members(rows: list[Row]) -> list[dict[str, str]]:
    """What a member of a sweep costs, by how many there are."""
    found = sorted(
        (r for r in rows if r["part"] == "members" and r["step_s"]),
        key=lambda r: (r["variant"], _count(r)),
    )
    if not found:
        return []
    single = {r["variant"]: float(r["step_s"]) for r in found if _count(r) == 1}
    return [
        {
            "members": r["members"],
            "variant": r["variant"],
            "step, ms": f"{1e3 * float(r['step_s']):.1f}",
            "each, ms": f"{1e3 * float(r['step_s']) / _count(r):.2f}",
            "of a single step": f"{float(r['step_s']) / _count(r) / single[r['variant']]:.2f}"
            if r["variant"] in single
            else "",
            "tokens a s": r["tokens_per_s"],
            "MFU": r["mfu"],
            "allocator, GiB": r["peak_gib"],
        }
        for r in found
    ]


def plot(rows: list[Row], path: pathlib.Path) -> None:
    """Throughput against members, and what a line through the single step would be."""
    from matplotlib.figure import Figure

    found = sorted((r for r in rows if r["part"] == "members" and r["step_s"]), key=_count)
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for variant in dict.fromkeys(r["variant"] for r in found):
        own = [r for r in found if r["variant"] == variant]
        speeds = [float(r["tokens_per_s"]) for r in own]
        label = f"one program, {variant}"
        (line,) = axes.plot([_count(r) for r in own], speeds, "o-", label=label)
        label = "one run after another"
        axes.axhline(speeds[0], linestyle=":", color=line.get_color(), label=label)
    counts = sorted({_count(r) for r in found})
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("members")
    axes.set_ylabel("tokens a second, all members")
    axes.set_xticks(counts, map(str, counts))
    axes.legend()
    figure.savefig(path, dpi=150)


def _is_told(row: Row) -> bool:
    """Whether a row has a note in place of figures."""
    return not row["step_s"] and not row["compiler_gib"]


def _count(row: Row) -> int:
    return int(row["members"])


def _devices(rows: list[Row]) -> str:
    """The device that was measured, and what with."""
    measured = [r for r in rows if r["step_s"] and not r["part"].startswith("plan_")]
    notes = {r["note"].partition(";")[0]: None for r in measured}
    return ", ".join({r["device"]: None for r in measured} | notes)


def _table(rows: list[dict[str, str]]) -> str:
    if not rows:
        return ""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(row[name] for name in names) + " |" for row in rows]
    return "\n".join(lines)


def main(path: str) -> None:
    rows, folder = read_rows(path), pathlib.Path(path).parent
    (folder / "results.md").write_text(text(rows))
    print(text(rows))
    if members(rows):
        plot(rows, folder / "members.png")


if __name__ == "__main__":
    main(sys.argv[1])
