"""What a linear layer costs by a TPU compiler's estimates stays low."""

import importlib
import os
import pathlib
import re
import subprocess
import sys

from tests.compilers import needs_tpu_compiler

TARGETS = pathlib.Path(__file__).resolve().parent.parent / "experiments" / "targets"


@needs_tpu_compiler
def test_a_linear_layer_costs_a_tpu_no_more_than_it_did():
    """By shares of the frozen layer, so that another compiler's model moves both."""
    command = [sys.executable, str(TARGETS / "linear.py"), "--targets=v5p", "--only=LoRA"]

    # a process of its own, for the compiler reads its environment once
    result = subprocess.run(
        [*command, "--size=2048", "--csv="],
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )

    assert result.returncode == 0, result.stderr[-2000:]
    found = re.findall(r"^v5p (.*?) ([\d,]+) ", result.stdout, flags=re.MULTILINE)
    costs = {name: int(number.replace(",", "")) for name, number in found}
    print(costs)
    assert costs["LoRA, NF4 kernel"] < 1.09 * costs["LoRA"]
    assert costs["LoRA, NF4 kernel with double quantisation"] < 1.13 * costs["LoRA"]


def test_instructions_of_a_schedule_are_counted_as_often_as_its_loops_run(monkeypatch):
    monkeypatch.syspath_prepend(TARGETS)
    chips = importlib.import_module("chips")
    schedule = """
     0   :  { %s1 = smov.u32 0 }
   0x1 LB: > { %s2 = sphi %s1, %s3 /* of the outer loop */ }
   0x2   : >> { %v1 = vld [vmem:[%s2]] }
   0x3   :  {}
   0x4   : >> { %p1 = scmp.ge.s32.totalorder %s4, 5 /* loop exit test */  ;;  %v2 = vld [vmem:%s2] }
   0x5   : > { %p2 = scmp.ge.s32.totalorder %s3, 3 /* loop exit test */ }
   0x6   :  { %p3 = scmp.ge.s32.totalorder %s3, 7 }
"""
    assert chips.count_instructions(schedule) == 1 + 3 * (1 + 5 * 3 + 1) + 1
