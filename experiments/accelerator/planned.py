"""What `lorax-ft plan` says that a device would hold in the benchmark's runs; it needs none.

    python experiments/accelerator/planned.py --device=h100 --cases=lora:products --output=x.csv

A case is METHOD:REMAT. The batch is as the loader makes it, with an attention mask.
"""

from __future__ import annotations

import time

from absl import app, flags
from common import GIB, MODELS, write_row
from settings import experiment

from lorax_ft import planning

_CASES = flags.DEFINE_list("cases", ["lora:products"], "METHOD:REMAT of each")
_MODEL = flags.DEFINE_enum("model", "llama-3-8b", list(MODELS), "shapes")
_DEVICE = flags.DEFINE_string("device", "h100", "as of lorax-ft plan")
_ROWS = flags.DEFINE_integer("rows", 4, "of a batch")
_LENGTH = flags.DEFINE_integer("length", 2048, "tokens of a row")
_OUTPUT = flags.DEFINE_string("output", None, "the table", required=True)


def main(argv: list[str]) -> None:
    target = planning.parse_target(_DEVICE.value)
    planning.prepare_process(target)
    for case in _CASES.value:
        method, _, remat = case.partition(":")
        start = time.perf_counter()
        config = experiment(method, _MODEL.value, remat, _ROWS.value, _LENGTH.value)
        plan = planning.make_plan(config, target)
        write_row(
            _OUTPUT.value,
            {
                "part": f"plan_{method}",
                "by": "lorax-ft plan",
                "model": _MODEL.value,
                "variant": remat,
                "rows": _ROWS.value,
                "length": _LENGTH.value,
                "device": _DEVICE.value,
                "step_s": plan.roofline.seconds if plan.roofline else "",
                "compiler_gib": (plan.needed or 0) / GIB or "",
                "build_s": time.perf_counter() - start,
                "note": plan.refused or plan.stands_in or plan.compiler,
            },
        )


if __name__ == "__main__":
    app.run(main)
