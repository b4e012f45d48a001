"""Loads what `run.py` wrote in transformers, PEFT and bitsandbytes, and compares the logits.

    python experiments/peft_round_trip/peer.py DIR

DIR/cases.json lists the cases. Prints a JSON object: by case the largest difference at tokens, and
the largest logit; or the error. Needs torch, transformers, peft and bitsandbytes, and not lorax_ft.
"""

from __future__ import annotations

import json
import pathlib
import sys
import warnings
from typing import Any

import numpy as np
import peft
import torch
import transformers
from safetensors.torch import load_file

FACTORIES = {
    "sequence_classification": transformers.AutoModelForSequenceClassification,
    "token_classification": transformers.AutoModelForTokenClassification,
    "causal_lm": transformers.AutoModelForCausalLM,
    "masked_lm": transformers.AutoModelForMaskedLM,
    "seq2seq_lm": transformers.AutoModelForSeq2SeqLM,
}


def main(folder: pathlib.Path) -> dict[str, Any]:
    found = {}
    for case in json.loads((folder / "cases.json").read_text()):
        try:
            found[case["name"]] = compare(folder, case)
        except Exception as error:  # of any of three libraries; it goes into the table
            found[case["name"]] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return found


def compare(folder: pathlib.Path, case: dict[str, Any]) -> dict[str, Any]:
    """One case's differences. Warnings of PEFT about keys of the file are errors."""
    factory = FACTORIES[case["task"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings(
            "error", message=".*(keys|missing|unexpected).*", category=UserWarning
        )
        model, loading = factory.from_pretrained(
            folder / case["model"], dtype=torch.float32, output_loading_info=True
        )
        strays = {name: sorted(keys) for name, keys in loading.items() if keys}
        if strays:
            raise ValueError(f"transformers found {strays}")
        if case["adapter"]:
            model = peft.PeftModel.from_pretrained(model, folder / case["adapter"])
    model.eval()
    result: dict[str, Any] = {}
    if case["kind"] == "four_bit":
        result["weights"] = four_bit_weights(model, folder / case["model"])
    with np.load(folder / f"{case['name']}.npz") as file, torch.inference_mode():
        want = file["logits"]
        names = [name for name in file if name != "logits"]
        inputs = {name: torch.tensor(file[name]).long() for name in names}
        got = model(**inputs).logits.float().numpy()
        mask = file[next(n for n in ("decoder_attention_mask", "attention_mask") if n in file)] == 1
    if got.ndim == 3:
        got = got[:, got.shape[1] - mask.shape[1] :][mask]  # what stands before tokens left out
        want = want[mask]
    result["difference"] = float(np.abs(got - want).max())
    result["largest"] = float(np.abs(want).max())
    return result


def four_bit_weights(model: torch.nn.Module, directory: pathlib.Path) -> int:
    """How many weights bitsandbytes holds with the file's codes, absmax and dequantised values."""
    import bitsandbytes

    tensors, count = load_file(directory / "model.safetensors"), 0
    for name, module in model.named_modules():
        if not isinstance(module, bitsandbytes.nn.Linear4bit):
            continue
        state = module.weight.quant_state
        same = (
            torch.equal(module.weight.data.reshape(-1), tensors[f"{name}.weight"].reshape(-1)),
            torch.equal(state.absmax.reshape(-1), tensors[f"{name}.weight.absmax"]),
            torch.equal(state.state2.absmax, tensors[f"{name}.weight.nested_absmax"]),
        )
        if not all(same):
            raise ValueError(f"{name}: codes, absmax and nested absmax are equal: {same}")
        module.train()  # in eval mode bitsandbytes computes in bfloat16 on some processors
        count += 1
    return count


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(json.dumps(main(pathlib.Path(sys.argv[1]))))
