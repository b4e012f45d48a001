"""What is exported loads in transformers, PEFT and bitsandbytes, with the same logits."""

import pytest

from experiments.peft_round_trip import run

METHODS = ("lora", "dora", "patterns", "biases", "embedding", "head", "ia3", "prompt", "prefix")


@pytest.mark.peer
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_every_export_gives_its_logits_in_the_library_it_is_for(peer, tmp_path, family):
    (tmp_path / family).mkdir()
    run.write(tmp_path, [family], METHODS)

    found = run.ask(peer, tmp_path)

    assert len(found) > len(METHODS)
    assert {name: r for name, r in found.items() if run.verdict(name, r) == "DIFFERS"} == {}
    assert found[f"{family}/nf4"]["weights"] >= 8
