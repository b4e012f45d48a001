"""What a linear layer costs by a TPU compiler's estimates stays low."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

TARGETS = pathlib.Path(__file__).resolve().parent.parent / "experiments" / "targets"


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no TPU compiler here (pip install libtpu)"
)
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
    assert costs["LoRA, NF4 kernel"] < 1.35 * costs["LoRA"]
    assert costs["LoRA, NF4 kernel with double quantisation"] < 1.43 * costs["LoRA"]
